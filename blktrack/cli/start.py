"""Track on at boot, before file systems are mounted: in the generation that `stop` put to rest, or
in a new one, whose replicas are resynced by their next sync. For a service unit: it starts all.

  blktrack start
  blktrack start /dev/sdb
"""

from __future__ import annotations

import argparse
import sys

from blktrack.cli.common import add_json, add_quiet, emit, store
from blktrack.cli.progress import Watcher
from blktrack.report import ServiceReport
from blktrack.tracker import service

EXITS = {"3": "the device is not tracked", "6": "busy: another run holds the device"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="only this one")
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    with Watcher(quiet=args.quiet) as watcher:
        report = ServiceReport(service.start(store(), args.device, watcher))
    # A device that is away at boot does not fail the others' unit; one asked for by name does.
    codes = {"failed": 1, "busy": 6, "absent": 1 if args.device else 0}
    show(report, codes, args)
    return exit_code(report, codes)


def show(report: ServiceReport, codes: dict[str, int], args: argparse.Namespace) -> None:
    """What was done on standard output, what was not on standard error."""
    if args.json:
        emit(report)
    for done in report.devices:
        line = f"{done.device}: {done.action}{f', {done.reason}' if done.reason else ''}"
        if codes.get(done.action):
            print(f"blktrack: {line}", file=sys.stderr)
            if done.hint:
                print(f"  -> {done.hint}", file=sys.stderr)
        elif not args.json and not args.quiet:
            print(line)


def exit_code(report: ServiceReport, codes: dict[str, int]) -> int:
    """The first failure's; 0 without one."""
    return next((code for done in report.devices if (code := codes.get(done.action, 0))), 0)
