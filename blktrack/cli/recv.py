"""Bring a replica to the point that a delta on standard input leads to: all of it or nothing.

The first delta of a link is a full copy and makes the replica. A later one has to start at the
replica's point; what is damaged, cut off or for another replica is refused, and changes nothing.
The epoch that is printed is for blktrack send --commit on the other side.

With --serve it is the far side of a sync to ssh://host/path, which starts it; standard input and
output are the wire. With --restrict, as the command of a key in authorized_keys, it does what the
client of ssh asked for if that is one of both, and nothing else: see docs/remote.md.

  ssh source blktrack send /dev/sdb --link here | blktrack recv /backup/sdb.img
  blktrack recv /backup/sdb.img < monday.delta
  blktrack recv --restrict /srv/replicas --device /dev/vg0/copy
"""

from __future__ import annotations

import argparse
import os
import select
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from blktrack.cli import forced
from blktrack.cli.common import (
    add_json,
    add_quiet,
    emit,
    instant,
    interruptible,
    paths,
    size,
    target,
)
from blktrack.cli.parser import Misused
from blktrack.errors import UsageError
from blktrack.ship.jail import Jail
from blktrack.units import format_duration, format_size

if TYPE_CHECKING:
    from blktrack.report import RecvReport

EXITS = ("6", "128+N")
_LOOK_EVERY = 1000  # milliseconds


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", type=target, help="a device or a file"
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite a target that holds something else"
    )
    add_json(parser)
    add_quiet(parser)
    parser.add_argument(
        "--serve", action="store_true", help="be the far side of a sync: ssh starts it so"
    )
    parser.add_argument(
        "--restrict",
        metavar="DIR",
        type=Path,
        help="only replicas in this folder, links resolved; without TARGET or --serve, what the"
        f" client of ssh asked for ({forced.VARIABLE})",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        action="append",
        default=[],
        help="with --restrict: a device that may be a replica too; may be repeated",
    )
    parser.add_argument(
        "--max-size", metavar="SIZE", type=size, help="with --restrict: at most for a replica file"
    )
    parser.add_argument(
        "--max-staging",
        metavar="SIZE",
        type=size,
        help="with --restrict: at most for an increment that is staged beside its replica",
    )
    parser.add_argument(
        "--allow-force",
        action="store_true",
        help="with --restrict: let the other host overwrite what is not its replica",
    )


def run(args: argparse.Namespace) -> int:
    jail = _jail(args)
    if not args.serve and args.target is None:
        if jail is None:
            raise Misused("TARGET is missing", program=args.parser_.prog)
        wanted = forced.parse(os.environ.get(forced.VARIABLE, ""))
        jail.check_force(asked=wanted.force)
        args.serve = not wanted.target
        args.target, args.force = wanted.target, wanted.force
        args.json, args.quiet = args.json or wanted.json, args.quiet or wanted.quiet
    elif args.serve and (args.target is not None or args.force):
        raise Misused(
            "--serve goes with neither TARGET nor --force: the other side names them",
            program=args.parser_.prog,
        )
    if os.isatty(sys.stdin.fileno()):
        raise UsageError(
            f"{'a sync' if args.serve else 'a delta'} is expected on standard input, which is a"
            " terminal",
            hint="blktrack send ... | blktrack recv TARGET, or blktrack recv TARGET < FILE",
        )
    if args.serve:
        return _serve(jail)
    if jail is not None:
        args.target = jail.admit(args.target)
    return _receive(args, jail)


def _jail(args: argparse.Namespace) -> Jail | None:
    if args.restrict is None:
        given = {
            "--device": args.device,
            "--max-size": args.max_size,
            "--max-staging": args.max_staging,
            "--allow-force": args.allow_force,
        }
        if alone := [name for name, value in given.items() if value]:
            raise Misused(f"{alone[0]} goes with --restrict", program=args.parser_.prog)
        return None
    return Jail(
        args.restrict,
        args.device,
        force=args.allow_force,
        most_staging=args.max_staging,
        most_size=args.max_size,
    )


def _serve(jail: Jail | None) -> int:
    """Standard output is the wire: whatever prints goes to standard error from here on."""
    from blktrack.ship.keeper import serve

    with (
        open(0, "rb", buffering=0, closefd=False) as source,
        open(os.dup(1), "wb", buffering=0) as sink,
    ):
        os.dup2(2, 1)
        serve(source, sink, paths(), jail)
    return 0


def _receive(args: argparse.Namespace, jail: Jail | None) -> int:
    # Not for --serve: its source waits for it to start.
    from blktrack.cli.progress import Watcher
    from blktrack.ship.receive import receive

    begun = time.monotonic()
    with (
        Watcher(quiet=args.quiet) as watcher,
        interruptible("receiving", "a replica that had a point is at it, or gets to the next"),
    ):
        file = _Input(sys.stdin.fileno())
        info = os.fstat(file.fileno())
        watcher.phase("recv", info.st_size if stat.S_ISREG(info.st_mode) else 0)
        report = receive(file, args.target, paths(), force=args.force, jail=jail, observer=watcher)
    report.duration_s = time.monotonic() - begun
    if args.json:
        emit(report)
    elif not args.quiet:
        print(describe(report))
    return 0


class _Input:
    """A file that is waited for where signals are seen.

    Python sees one between two steps of its own or where it breaks a wait. One that comes at the
    very end of a step would be seen after the read that follows: never, if the sender is stuck.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def fileno(self) -> int:
        return self._fd

    def readinto(self, buffer: memoryview) -> int | None:
        while not self._poll.poll(_LOOK_EVERY):
            pass
        try:
            return os.readv(self._fd, [buffer])
        except BlockingIOError:
            return None


def describe(report: RecvReport) -> str:
    zero = f", {format_size(report.bytes_zeroed)} zero" if report.bytes_zeroed else ""
    return (
        f"{report.mode}: {format_size(report.bytes_shipped)} of data{zero} in {report.extents}"
        f" extents from {report.source}, {format_duration(report.duration_s)}\n"
        f"replica is at epoch {report.epoch}, {instant(report.point)},"
        f" consistency {report.consistency}"
    )
