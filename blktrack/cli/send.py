"""Write a delta to standard output that leads a replica elsewhere to the present state of a device.

The first time that a link is named everything is sent, then what changed since the point that its
receiver is known to have committed: tell it by --commit, which sends nothing. Until then each
delta starts at the same point; one that was lost is simply sent again.

  blktrack send /dev/sdb --link far | ssh far blktrack recv /backup/sdb.img
  blktrack send /dev/sdb --link far --commit 7
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from blktrack.cli.capture import add_capture, capture_options
from blktrack.cli.common import (
    add_json,
    add_limit,
    add_quiet,
    emit,
    instant,
    stoppable,
    store,
)
from blktrack.cli.progress import Watcher
from blktrack.errors import UsageError
from blktrack.report import SendReport
from blktrack.send import commit, send
from blktrack.units import format_duration, format_size

EXITS = ("3", "4", "6", "128+N")
_BEST = 19  # zstd's highest level without options of its own


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="a tracked device")
    parser.add_argument(
        "--link", required=True, metavar="NAME", help="which receiver: a name of your choice"
    )
    parser.add_argument(
        "--commit", type=_epoch, metavar="EPOCH", help="the receiver has it: send nothing, note it"
    )
    parser.add_argument("--full", action="store_true", help="send everything again")
    parser.add_argument(
        "--no-resync", action="store_true", help="exit 3 instead of sending everything again"
    )
    add_limit(parser)
    parser.add_argument(
        "--compress", type=_level, metavar="LEVEL", help=f"by zstd: 1, fast, to {_BEST}, small"
    )
    add_capture(parser)
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    if not args.link:
        raise UsageError("--link is empty", hint="name the receiver, as in --link far")
    if args.commit is not None:
        done = commit(store(), args.device, args.link, args.commit)
        if args.json:
            emit(done)
        elif not args.quiet:
            print(f"link {done.link} is at epoch {done.epoch}, {instant(done.point)}")
        return 0
    if os.isatty(sys.stdout.fileno()):
        raise UsageError(
            "standard output is a terminal, and a delta is not to be read there",
            hint="blktrack send ... | blktrack recv TARGET, or blktrack send ... > FILE",
        )
    options = capture_options(args)
    options.full, options.no_resync = args.full, args.no_resync
    with (
        Watcher(quiet=args.quiet) as watcher,
        stoppable(options),
        open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as file,
    ):
        report = send(
            store(),
            args.device,
            args.link,
            file,
            options=options,
            observer=watcher,
            level=args.compress,
        )
    # Standard output is the delta.
    if args.json:
        print(json.dumps(report.as_json()), file=sys.stderr)
    elif not args.quiet:
        print(describe(report, args.device), file=sys.stderr)
    return 0


def describe(report: SendReport, device: str) -> str:
    reason = f" ({report.reason})" if report.reason else ""
    start = f"from epoch {report.base}" if report.base is not None else "all of it"
    return (
        f"{report.mode}{reason}: {start} to epoch {report.epoch},"
        f" {format_size(report.bytes_changed)} in {report.extents} extents,"
        f" {format_size(report.bytes_wire)} sent, {format_duration(report.duration_s)}\n"
        f"leads to {instant(report.point)}, consistency {report.consistency}; when it is there:"
        f" blktrack send {device} --link {report.link} --commit {report.epoch}"
    )


def _epoch(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an epoch, which is a number: the one that blktrack recv named"
        )
    return int(text)


def _level(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= _BEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level from 1 to {_BEST}")
    return int(text)
