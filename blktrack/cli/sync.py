"""Bring a replica to the present state of a device: the first time by a full copy, then by what
changed, after a doubt by comparing.

  blktrack sync /dev/sdb /backup/sdb.img
  blktrack sync /dev/vg0/data /dev/vg1/data --limit 50M --quiet
  blktrack sync /dev/sdb /backup/sdb.img --consistency filesystem \\
      --pre-freeze 'mydb --hold' --post-freeze 'mydb --go-on'
"""

from __future__ import annotations

import argparse
import math

from blktrack.cli.common import (
    add_json,
    add_quiet,
    emit,
    instant,
    size,
    stoppable,
    store,
    target,
)
from blktrack.cli.progress import Watcher
from blktrack.errors import UsageError
from blktrack.quiesce.freeze import CAP, CAP_MOST
from blktrack.report import SyncReport
from blktrack.round import Options
from blktrack.sync import sync
from blktrack.units import format_duration, format_size


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="a tracked device")
    parser.add_argument("target", metavar="TARGET", type=target, help="a device or a file")
    parser.add_argument("--full", action="store_true", help="copy everything again")
    parser.add_argument(
        "--no-resync", action="store_true", help="exit 3 instead of comparing everything"
    )
    parser.add_argument("--limit", type=size, metavar="RATE", help="bytes read per second, as 50M")
    parser.add_argument(
        "--force", action="store_true", help="overwrite a target that holds something else"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="write an increment straight into the replica, where there is no room to stage it "
        "beside: it is at no point until that has ended, in this or a later sync",
    )
    parser.add_argument(
        "--consistency",
        choices=["none", "crash", "filesystem"],
        default="crash",
        help="what a point must be: crash, a state that pulling the plug could have left "
        "(default); filesystem, one that mounts cleanly, by a short freeze; none, whatever was "
        "read while writes went on",
    )
    parser.add_argument(
        "--no-freeze",
        action="store_true",
        help="never freeze file systems for a crash point that is not to be had without",
    )
    parser.add_argument(
        "--freeze-cap",
        type=_cap,
        default=CAP,
        metavar="SECONDS",
        help=f"end a freeze after this long, without a point (default {CAP:g}, at most "
        f"{CAP_MOST:g})",
    )
    parser.add_argument(
        "--pre-freeze",
        action="append",
        default=[],
        metavar="CMD",
        help="run this before a freeze, to have a database write all it has, say; with "
        "--consistency filesystem always, even if nothing is mounted. If it fails there is no "
        "point. It finds BLKTRACK_PHASE and BLKTRACK_DEVICE in its environment. May be repeated",
    )
    parser.add_argument(
        "--post-freeze",
        action="append",
        default=[],
        metavar="CMD",
        help="run this after it, whatever came of it; a failure is a warning. May be repeated",
    )
    add_json(parser)
    add_quiet(parser)


def _cap(text: str) -> float:
    """argparse type: the cap of a freeze."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= CAP_MOST:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds above 0 and at most {CAP_MOST:g}"
        )
    return value


def run(args: argparse.Namespace) -> int:
    options = Options(full=args.full, no_resync=args.no_resync, limit=args.limit, force=args.force)
    options.consistency, options.freeze = args.consistency, not args.no_freeze
    options.in_place = args.in_place
    options.cap = args.freeze_cap
    options.pre, options.post = tuple(args.pre_freeze), tuple(args.post_freeze)
    _refuse_contradictions(options)
    with Watcher(quiet=args.quiet) as watcher, stoppable(options):
        report, _ = sync(store(), args.device, args.target, options, watcher)
    if args.json:
        emit(report)
    elif not args.quiet:
        print(describe(report))
    return 0


def _refuse_contradictions(options: Options) -> None:
    """A hook that would never run, or a freeze that is both asked for and forbidden."""
    if options.consistency == "filesystem" and not options.freeze:
        raise UsageError("--consistency filesystem needs the freeze that --no-freeze forbids")
    if (options.pre or options.post) and (options.consistency == "none" or not options.freeze):
        why = "--consistency none" if options.freeze else "--no-freeze"
        raise UsageError(f"with {why} nothing is frozen, and no hook would run")


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
