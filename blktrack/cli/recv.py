"""Bring a replica to the point that a delta on standard input leads to: all of it or nothing.

The first delta of a link is a full copy and makes the replica. A later one has to start at the
replica's point; what is damaged, cut off or for another replica is refused, and changes nothing.
The epoch that is printed is for blktrack send --commit on the other side.

  ssh source blktrack send /dev/sdb --link here | blktrack recv /backup/sdb.img
  blktrack recv /backup/sdb.img < monday.delta
"""

from __future__ import annotations

import argparse
import os
import select
import stat
import sys
import time

from blktrack.cli.common import add_json, add_quiet, emit, instant, interruptible, paths, target
from blktrack.cli.progress import Watcher
from blktrack.errors import UsageError
from blktrack.report import RecvReport
from blktrack.ship.receive import receive
from blktrack.units import format_duration, format_size

EXITS = ("6", "128+N")
_LOOK_EVERY = 1000  # milliseconds


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", type=target, help="a device or a file")
    parser.add_argument(
        "--force", action="store_true", help="overwrite a target that holds something else"
    )
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    if os.isatty(sys.stdin.fileno()):
        raise UsageError(
            "a delta is expected on standard input, which is a terminal",
            hint="blktrack send ... | blktrack recv TARGET, or blktrack recv TARGET < FILE",
        )
    begun = time.monotonic()
    with (
        Watcher(quiet=args.quiet) as watcher,
        interruptible("receiving", "a replica that had a point is at it, or gets to the next"),
    ):
        file = _Input(sys.stdin.fileno())
        info = os.fstat(file.fileno())
        watcher.phase("recv", info.st_size if stat.S_ISREG(info.st_mode) else 0)
        report = receive(file, args.target, paths(), force=args.force, observer=watcher)
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
