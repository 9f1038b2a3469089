"""The command line: one module per command, one ladder from errors to exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Collection, Sequence
from types import ModuleType

from blktrack.cli.parser import EXITS, Misused, Parser
from blktrack.cli.version import Version
from blktrack.errors import BlktrackError

# numpy loads OpenBLAS, which starts a thread for every CPU at once; nothing here needs one, and
# without them a command starts some 50 ms sooner.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Each names a module here, with `arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    "doctor": "what this host can do, each failure with its remedy",
    "track": "begin to track a device's changes",
    "untrack": "stop tracking a device",
    "status": "devices, replicas, pending bytes, lag, doubts",
    "top": "live rates of devices, lag of replicas, where dirty blocks lie",
    "extents": "what the next sync would ship",
    "sync": "bring a replica to the present state of a device",
    "send": "write a delta for a replica elsewhere",
    "recv": "bring a replica to where a delta leads",
    "verify": "compare a replica with its device",
    "history": "what the last syncs did",
    "metrics": "figures for Prometheus",
    "config": "check the policy file",
    "start": "track on at boot",
    "stop": "stop tracking cleanly at shutdown",
    "service": "the systemd unit that does both",
    "install": "a schedule for sync --all, by cron or systemd",
    "completion": "what a shell needs to complete commands and options",
    "help": "what a command does, as its --help",
}
# recv: a replica file is written by whoever may write it.
_NEEDS_ROOT = set(COMMANDS) - {"doctor", "recv", "config", "help", "completion"}

# Packages of Python's that may be missing, and Debian's names of them. A host that only receives
# has the first three.
_PACKAGES = {
    "numpy": "python3-numpy",
    "xxhash": "python3-xxhash",
    "zstandard": "python3-zstandard",
    "pyroute2": "python3-pyroute2",
    "rich": "python3-rich",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code of the outside contract."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:
            _flush()
    except Misused as error:
        _complain(str(error), error.hint, error.program)
        return error.exit_code
    except BlktrackError as error:
        _complain(str(error), error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _PACKAGES:
            raise
        _complain(
            f"this needs the Python package {name}, which is not installed",
            f"apt-get install {_PACKAGES[name]}, or install {name} where this Python finds it",
        )
        return 1
    except MemoryError as error:
        detail = f": {error}" if str(error) else ""
        _complain(f"out of memory{detail}", "free some, or track with a larger --granularity")
        return 1
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to tell it.
        _drop_output()
        return 141
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        hint = "see the kernel log if this is unexpected"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "let it have more open files (ulimit -n)"
        _complain(what or type(error).__name__, hint)
        return 1


def _run(words: list[str]) -> int:
    if not words:
        print(_parser([]).format_help(), end="", file=sys.stderr)
        return 2
    args = _parse(words)
    if args.command in _NEEDS_ROOT and os.geteuid() != 0:
        raise BlktrackError(f"blktrack {args.command} needs root", hint="run it with sudo")
    return int(_module(args.command).run(args))


def _flush() -> None:
    """Here, where it may still fail: at the exit of the process Python would show a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise BlktrackError(
            f"the command is done, but its output cannot be written: {error.strerror}",
            hint="free space where standard output goes to",
        ) from error


def _drop_output() -> None:
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, hint: str = "", who: str = "blktrack") -> None:
    with contextlib.suppress(OSError):
        print(f"{who}: {message}", file=sys.stderr)
        if hint:
            print(f"  -> {hint}", file=sys.stderr)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"blktrack.cli.{command}")


def parsers() -> Parser:
    """The parser of everything, whose `subparsers` are those of all commands."""
    return _parser(COMMANDS)


def _parser(wanted: Collection[str]) -> Parser:
    """Importing every command for its arguments would slow each of them down: only these are
    complete."""
    parser = Parser(
        prog="blktrack",
        description="Replicate live block devices by the sector ranges that changed.",
        usage="%(prog)s [--help] [--version] COMMAND ...",
    )
    parser.exits = EXITS
    parser.epilog = (
        "blktrack COMMAND --help tells more of each, with examples and exit codes. To begin: "
        "blktrack doctor, blktrack track DEVICE, blktrack sync DEVICE TARGET."
    )
    parser.add_argument("--version", action=Version, help="show all versions that matter and exit")
    commands = parser.add_subparsers(
        title="commands", prog="blktrack", dest="command", metavar="COMMAND"
    )
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in wanted:
            module = _module(name)
            command.describe(module.__doc__ or "", getattr(module, "EXITS", ()))
            module.arguments(command)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = _parser([chosen] if chosen in COMMANDS else [])
    args, left = parser.parse_known_args(words)
    if not args.command and left in ([], ["--"]):  # whether it is left depends on Python
        raise Misused("a command is missing", program=parser.prog)
    if left:
        args.parser_.refuse(left)
    return args
