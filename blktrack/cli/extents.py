"""List what the next sync would ship: start and length in bytes, one extent a line.

blktrack extents /dev/sdb
blktrack extents /dev/sdb --target /backup/sdb.img --json
"""

from __future__ import annotations

import argparse

from blktrack.cli.common import add_json, emit, replica, store
from blktrack.tracker import status

EXITS = {"3": "the device is not tracked", "6": "busy: another run holds the device"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="a tracked device")
    parser.add_argument(
        "--target", metavar="T", type=replica, help="only what this replica lacks: path or name"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    report = status.extents(store(), args.device, args.target)
    if args.json:
        emit(report)
    else:
        for start, length in report.extents:
            print(start, length)
    return 0
