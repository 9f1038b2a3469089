"""Begin to track a device's changes. A second call changes nothing. The first on a kernel probes
it on a scratch device, in a moment, and refuses what cannot be tracked on it.

blktrack track /dev/sdb
blktrack track /dev/vg0/data --granularity 64K
"""

from __future__ import annotations

import argparse
import sys

from blktrack.cli.common import add_json, add_quiet, deferring, emit, renew_unit, size, store
from blktrack.cli.progress import Watcher
from blktrack.device import source
from blktrack.errors import BlktrackError
from blktrack.probe import verdict
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
        device = source(args.device)
        with deferring("the probe of this kernel", "nothing is tracked that was not") as stop:
            unknown = verdict.check(store(), device, watcher, stop, hand_on=True)
        try:
            report = tracker.track(store(), args.device, args.granularity, watcher)
        except BlktrackError:
            verdict.drop_unused(store())
            raise
    if unknown:
        report.warnings.append(verdict.not_probed(unknown))
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
