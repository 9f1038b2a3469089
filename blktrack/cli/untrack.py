"""Stop tracking a device. Its replicas stay; the next sync after a new track is a resync.

blktrack untrack /dev/sdb
"""

from __future__ import annotations

import argparse

from blktrack.cli.common import add_quiet, renew_unit, store
from blktrack.cli.progress import Watcher
from blktrack.tracker import tracker

EXITS = {"3": "the device is not tracked", "6": "busy: another run holds the device"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="a tracked device")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    with Watcher(quiet=args.quiet) as watcher:
        tracker.untrack(store(), args.device, watcher)
    renew_unit()
    if not args.quiet:
        print(f"{args.device}: no longer tracked")
    return 0
