"""Compare a replica with its device, byte by byte. Exit code 5 if they differ.

What changed on the device since the last sync differs too: sync first, with the device quiet.

  blktrack verify /dev/sdb /backup/sdb.img
  blktrack verify /dev/sdb /backup/sdb.img --repair
  blktrack verify /dev/sdb ssh://vault/backup/sdb.img
"""

from __future__ import annotations

import argparse

from blktrack.cli.common import (
    add_json,
    add_limit,
    add_quiet,
    emit,
    paths,
    stoppable,
    store,
    target,
)
from blktrack.cli.progress import Watcher
from blktrack.cli.remote import add_remote, remote_options
from blktrack.options import Options
from blktrack.policy import load
from blktrack.rates import UNLIMITED
from blktrack.report import VerifyReport
from blktrack.units import format_size
from blktrack.verify import repair, verify

EXITS = {
    "3": "the device is not tracked (with --repair)",
    "4": "the time limit was over before the end, or no consistent point was reached (with "
    "--repair)",
    "5": "the replica differs from its device",
    "6": "busy: another run holds the replica, or with --repair the device",
    "128+N": "stopped by signal N",
}
_SHOWN = 10


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the source")
    parser.add_argument("target", metavar="TARGET", type=target, help="its replica")
    parser.add_argument("--repair", action="store_true", help="resync what differs")
    add_limit(parser)
    add_remote(parser)
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    link = load(paths().policy).link(args.device, args.target)
    options = Options(limit=args.limit or UNLIMITED)
    if link is not None:  # how its host is reached; what a point must be is for syncs
        said = link.options()
        options.compress, options.patience = said.compress, said.patience
        options.retry_for = said.retry_for
    remote_options(args, options, args.target)
    work = repair if args.repair else verify
    with Watcher(quiet=args.quiet) as watcher, stoppable(options):
        report = work(store(), args.device, args.target, options, watcher)
    if args.json:
        emit(report)
    elif not args.quiet:
        _print(report)
    return 5 if report.bytes_different > report.bytes_repaired else 0


def _print(report: VerifyReport) -> None:
    compared = f"{format_size(report.bytes_compared)} compared"
    if not report.bytes_different:
        print(f"identical: {compared}")
        return
    print(f"different: {format_size(report.bytes_different)} of {compared}")
    for start, length in report.extents[:_SHOWN]:
        print(f"  {start} {length}")
    if len(report.extents) > _SHOWN:
        print(f"  and {len(report.extents) - _SHOWN} more extents")
    if report.bytes_repaired:
        print(f"repaired: {format_size(report.bytes_repaired)}")
