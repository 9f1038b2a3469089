"""Write the man pages, blktrack.8 and blktrack-COMMAND.8, into a folder.

    python tools/manpages.py DIR

They are made from what --help is made of: the parsers and the docstrings of the commands. The date
is that of SOURCE_DATE_EPOCH, so that a build can be repeated to the byte.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ.pop("BLKTRACK_ROOT", None)  # the pages are of the host's own instance

from blktrack import __version__
from blktrack.cli import COMMANDS, parsers
from blktrack.cli.parser import Parser
from blktrack.config import Paths

_WHOLE = (
    "blktrack keeps a replica of a live block device: a copy on another device or in a file, or on "
    "another host. Programs in the kernel record which sectors change, without a snapshot, a "
    "kernel module or anything in the I/O path, and each sync copies just those. A replica is "
    "always at a point, a state that its source had, once its first copy has ended.",
    "Tracking outlives every process, but not a boot, unless the device is stopped cleanly before: "
    "see blktrack-service(8). Whatever could have hidden a change is told by blktrack-status(8), "
    "and the next sync repairs it by comparing replica and source.",
)
_ENVIRONMENT = {
    "BLKTRACK_ROOT": "A folder below which this instance keeps all its files, and which gives its "
    "programs in the kernel a place of their own, so that several instances do not meet.",
    "BLKTRACK_SSH": "What to run instead of ssh to reach another host: words as for a shell, the "
    "last of which are an ssh's, as `ssh -F FILE`. Its options win over those of blktrack.",
}
_HOOKS = {
    "BLKTRACK_PHASE": "Set for hooks: pre or post, the side of the freeze that they run on.",
    "BLKTRACK_DEVICE": "Set for hooks: the device that is read.",
}


def pages(when: float) -> Iterator[tuple[str, str]]:
    """(file name, text) of every page."""
    top = parsers()
    date = time.strftime("%Y-%m-%d", time.gmtime(when))
    yield "blktrack.8", _page(_overview(top), "blktrack", date)
    for command, parser in top.subparsers.items():
        name = f"blktrack-{command}"
        yield f"{name}.8", _page(_command(command, parser), name, date)


def _page(lines: Iterable[str], name: str, date: str) -> str:
    head = f'.TH {_exact(name.upper())} 8 {date} "blktrack {__version__}" "System Administration"'
    return "\n".join([head, ".ad l", *lines, ""])


def _overview(top: Parser) -> Iterator[str]:
    yield from _name("blktrack", "replicate live block devices by what changed on them")
    yield ".SH SYNOPSIS"
    yield from (".SY blktrack", r".I COMMAND", r"\&.\|.\|.", ".YS")
    yield from (".SY blktrack", r".B \-\-version", ".YS")
    yield ".SH DESCRIPTION"
    yield from _prose(_WHOLE)
    yield ".SH COMMANDS"
    for command, summary in COMMANDS.items():
        yield from (".TP", rf".BR blktrack\-{_exact(command)} (8)", *_filled(summary))
    yield ".SH OPTIONS"
    yield from _options(top)
    yield ".SH EXAMPLES"
    yield from _examples(["blktrack track /dev/sdb\nblktrack sync /dev/sdb /backup/sdb.img"])
    yield from _rest(top, [f"blktrack-{command}" for command in COMMANDS], _ENVIRONMENT | _HOOKS)


def _command(command: str, parser: Parser) -> Iterator[str]:
    actions = list(parser.walk())[1:]
    yield from _name(f"blktrack-{command}", COMMANDS[command])
    yield ".SH SYNOPSIS"
    for one in actions or [parser]:
        yield from _synopsis(one)
    yield ".SH DESCRIPTION"
    yield from _prose(parser.text.prose)
    yield ".SH OPTIONS"
    yield from _options(parser)
    for action in actions:
        yield f'.SH "{_exact(action.prog.removeprefix("blktrack ").upper())}"'
        yield from _prose(action.text.prose)
        yield from _options(action)
    yield ".SH EXAMPLES"
    yield from _examples(example for one in parser.walk() for example in one.text.examples)
    hooks = any("--pre-freeze" in action.option_strings for action in parser.arguments)
    yield from _rest(parser, ["blktrack"], _ENVIRONMENT | (_HOOKS if hooks else {}))


def _name(name: str, summary: str) -> Iterator[str]:
    first, *more = _filled(summary, 78 - len(name) - name.count("-") - 6)
    yield from (".SH NAME", rf"{_exact(name)} \- {first}", *more)


def _synopsis(parser: Parser) -> Iterator[str]:
    yield f'.SY "{_exact(parser.prog)}"'
    for option in (action for action in parser.arguments if action.option_strings):
        if option.dest != "help":
            shown = _spelled(option, option.option_strings[-1:])
            yield shown if option.required else f"[{shown}]"
    for argument in (action for action in parser.arguments if not action.option_strings):
        yield {"?": "[{}]", "*": r"[{}\ .\|.\|.]"}.get(str(argument.nargs), "{}").format(
            _value(argument)
        )
    yield ".YS"


def _options(parser: Parser) -> Iterator[str]:
    """Also the arguments."""
    for action in parser.arguments:
        if isinstance(action, argparse._SubParsersAction):
            continue
        yield ".TP"
        yield _spelled(action, action.option_strings) if action.option_strings else _value(action)
        yield from _filled(parser.help_of(action) or "One of these.")


def _spelled(action: argparse.Action, names: Iterable[str]) -> str:
    value = "" if action.nargs == 0 else rf"\ {_value(action)}"
    return ", ".join(rf"\fB{_exact(name)}\fR{value}" for name in names)


def _value(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "|".join(rf"\fB{_exact(str(choice))}\fR" for choice in action.choices)
    return rf"\fI{_exact(str(action.metavar or action.dest.upper()))}\fR"


def _rest(parser: Parser, related: list[str], environment: dict[str, str]) -> Iterator[str]:
    yield '.SH "EXIT STATUS"'
    for code, meaning in parser.exits.items():
        yield from (".TP", rf".B {_exact(code)}", *_filled(meaning))
    yield ".SH FILES"
    paths = Paths.of_host()
    for place, what in {
        f"{paths.policy}": "the policy: devices, replicas, schedules",
        f"{paths.pins}/": "pinned programs and maps",
        f"{paths.run}/": "pending sets and locks, which last until the next boot",
        f"{paths.lib}/": "devices, tracking histories, replicas",
        "FILE.blktrack/": "beside a replica file: whose it is, at which point, and the increment "
        "that is being staged",
    }.items():
        yield from (".TP", rf".I {_exact(place)}", *_filled(what))
    yield ".SH ENVIRONMENT"
    for name, what in environment.items():
        yield from (".TP", rf".B {_exact(name)}", *_filled(what))
    yield '.SH "SEE ALSO"'
    last = len(related) - 1
    for number, name in enumerate(related):
        yield rf".BR {_exact(name)} (8){'' if number == last else ','}"


def _prose(paragraphs: Iterable[str]) -> Iterator[str]:
    for number, paragraph in enumerate(paragraphs):
        if number:
            yield ".PP"
        yield from _filled(paragraph)


def _filled(text: str, width: int = 66) -> list[str]:
    """Lines of roff that stay short when they are escaped."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [_text(line) for line in lines]


def _examples(blocks: Iterable[str]) -> Iterator[str]:
    """Each once: a command may show what its actions show too."""
    shown: list[str] = []
    for block in blocks:
        lines = block.splitlines()
        if all(line in shown for line in lines):
            continue
        if shown:
            yield ".PP"
        shown += lines
        yield from (".RS 4", ".EX", *(_exact(line) for line in lines), ".EE", ".RE")


def _text(line: str) -> str:
    """Prose: a dash is a hyphen, but one of an option or in a path."""
    words = re.split(r"(\s+)", line)
    return _guarded(
        "".join(_escape(word, exact=bool(re.match(r"\W*-|.*/|blktrack-", word))) for word in words)
    )


def _exact(line: str) -> str:
    """What is to be typed."""
    return _guarded(_escape(line, exact=True))


def _guarded(line: str) -> str:
    """A dot or a quote at the start of a line would make it a request."""
    return rf"\&{line}" if line.startswith((".", "'")) else line


_SPECIAL = {
    "\\": r"\e",
    "^": r"\(ha",
    "~": r"\(ti",
    "`": r"\(ga",
    '"': r"\(dq",
    "'": r"\(aq",
}


def _escape(text: str, *, exact: bool) -> str:
    special = _SPECIAL | {"-": r"\-"} if exact else _SPECIAL
    return "".join(
        special.get(char, char if char.isascii() else f"\\[u{ord(char):04X}]") for char in text
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the man pages into a folder.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="is made if it is not there")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages(float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))):
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
