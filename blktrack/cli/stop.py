"""Stop tracking cleanly at shutdown: a device that nobody uses keeps its generation over the boot,
with a fingerprint that tells afterwards whether it was touched. Exit code 6 if one is in use: that
one is tracked on, and is resynced if the host goes down now. For a service unit: it stops all.

  blktrack stop
  blktrack stop /dev/sdb
  blktrack stop --detach
"""

from __future__ import annotations

import argparse

from blktrack.cli.common import add_json, add_quiet, store
from blktrack.cli.progress import Watcher
from blktrack.cli.start import exit_code, show
from blktrack.report import ServiceReport
from blktrack.tracker import service

EXITS = ("3", "6")
_CODES = {"failed": 1, "busy": 6, "in use": 6}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="only this one")
    parser.add_argument(
        "--detach",
        action="store_true",
        help="let go of devices in use too, which begin anew with a resync at the next start or "
        "sync, and leave nothing in the kernel: before blktrack is removed",
    )
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    with Watcher(quiet=args.quiet) as watcher:
        report = ServiceReport(service.stop(store(), args.device, watcher, let_go=args.detach))
    show(report, _CODES, args)
    return exit_code(report, _CODES)
