"""Begin to track a device's changes. A second call changes nothing.

blktrack track /dev/sdb
blktrack track /dev/vg0/data --granularity 64K
"""

from __future__ import annotations

import argparse
import sys

from blktrack.cli.common import add_json, add_quiet, emit, renew_unit, size, store
from blktrack.cli.progress import Watcher
from blktrack.tracker import tracker
from blktrack.units import format_size

EXITS = {"6": "busy: another run holds the device"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="a disk, partition or logical volume")
    parser.add_argument(
        "--granularity",
        type=size,
        metavar="SIZE",
        help="bytes per dirty bit, a power of two (default: 4K, or what fits 32 MiB of memory)",
    )
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    with Watcher(quiet=args.quiet) as watcher:
        report = tracker.track(store(), args.device, args.granularity, watcher)
    renew_unit()
    for warning in report.warnings:
        if not args.quiet:
            print(f"blktrack: warning: {warning}", file=sys.stderr)
    if args.json:
        emit(report)
    elif not args.quiet:
        print(
            f"{report.device}: {'tracking' if report.began else 'already tracked'}, "
            f"{format_size(report.size)} in granules of {format_size(report.granularity)}, "
            f"{format_size(report.kernel_bytes)} of kernel memory"
        )
    return 0
