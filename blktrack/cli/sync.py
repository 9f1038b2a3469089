"""Bring a replica to the present state of a device: the first time by a full copy, then by what
changed, after a doubt by comparing.

  blktrack sync /dev/sdb /backup/sdb.img
  blktrack sync /dev/vg0/data /dev/vg1/data --limit 50M --quiet
  blktrack sync /dev/sdb /backup/sdb.img --consistency filesystem \\
      --pre-freeze 'mydb --hold' --post-freeze 'mydb --go-on'
"""

from __future__ import annotations

import argparse

from blktrack.cli.capture import add_capture, capture_options
from blktrack.cli.common import (
    add_json,
    add_limit,
    add_quiet,
    emit,
    instant,
    paths,
    stoppable,
    store,
    target,
)
from blktrack.cli.progress import Watcher
from blktrack.policy import load
from blktrack.report import SyncReport
from blktrack.sync import sync
from blktrack.units import format_duration, format_size

EXITS = ("3", "4", "6", "128+N")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="a tracked device")
    parser.add_argument("target", metavar="TARGET", type=target, help="a device or a file")
    parser.add_argument("--full", action="store_true", help="copy everything again")
    parser.add_argument(
        "--no-resync", action="store_true", help="exit 3 instead of comparing everything"
    )
    add_limit(parser)
    parser.add_argument(
        "--force", action="store_true", help="overwrite a target that holds something else"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="write an increment straight into the replica, where there is no room to stage it "
        "beside: it is at no point until that has ended, in this or a later sync",
    )
    add_capture(parser)
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    link = load(paths().policy).link(args.device, args.target)
    options = capture_options(args, link.options() if link else None)
    options.full, options.force, options.no_resync = args.full, args.force, args.no_resync
    options.in_place |= args.in_place
    with Watcher(quiet=args.quiet) as watcher, stoppable(options):
        report, _ = sync(store(), args.device, args.target, options, watcher)
    if args.json:
        emit(report)
    elif not args.quiet:
        print(describe(report))
    return 0


def describe(report: SyncReport) -> str:
    reason = f" ({report.reason})" if report.reason else ""
    shipped = f"{format_size(report.bytes_shipped)} shipped"
    if report.bytes_zeroed:
        shipped += f", {format_size(report.bytes_zeroed)} zero"
    looked = "compared" if report.mode == "resync" else "copied"
    what = (
        "nothing had changed"
        if report.mode == "nothing"
        else f"{format_size(report.bytes_changed)} in {report.extents} extents {looked}, {shipped}"
    )
    return (
        f"{report.mode}{reason}: {what}, {format_duration(report.duration_s)}\n"
        f"replica is at {instant(report.point)}, consistency {report.consistency}"
    )
