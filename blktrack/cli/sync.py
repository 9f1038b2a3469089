"""Bring a replica to the present state of a device: the first time by a full copy, then by what
changed, after a doubt by comparing.

  blktrack sync /dev/sdb /backup/sdb.img
  blktrack sync /dev/vg0/data /dev/vg1/data --limit 50M --quiet
  blktrack sync /dev/sdb ssh://vault/backup/sdb.img --retry-for 10m
  blktrack sync /dev/sdb /backup/sdb.img --consistency filesystem \\
      --pre-freeze 'mydb --hold' --post-freeze 'mydb --go-on'
  blktrack sync --all --quiet --remind 4h

With --all it syncs every enabled replica of the policy file: devices side by side, those of one
device in turn. What fails of one stops no other; the exit code is the worst: that of a signal, else
the first there is of 1, 2, 3, 4, 6, 0.
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
from blktrack.cli.parser import Misused
from blktrack.cli.progress import Watcher
from blktrack.cli.remind import add_remind, reminded
from blktrack.cli.remote import add_remote, remote_options
from blktrack.policy import load
from blktrack.report import SyncReport
from blktrack.sync import sync
from blktrack.units import format_duration, format_size

EXITS = ("3", "4", "6", "128+N")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "blktrack sync DEVICE TARGET [option ...]\n       blktrack sync --all [option ...]"
    )
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="a tracked device")
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        type=target,
        help="a device or a file, or ssh://[user@]host[:port]/path on another host",
    )
    parser.add_argument(
        "--all", action="store_true", help="every enabled replica of the policy file"
    )
    parser.add_argument(
        "--jobs",
        type=_jobs,
        metavar="N",
        help="with --all: devices at a time (default: what the policy says, or 4)",
    )
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
    add_remote(parser)
    add_capture(parser)
    add_json(parser)
    add_quiet(parser)
    add_remind(parser)


def run(args: argparse.Namespace) -> int:
    if args.all:
        from blktrack.cli import fleet

        _refuse_with_all(args)
        return reminded(args, "sync --all", lambda: fleet.run(args))
    given = {"DEVICE": args.device, "TARGET": args.target}
    if missing := [name for name, value in given.items() if not value]:
        only = f"{missing[0]} is missing"
        raise Misused(
            only if len(missing) == 1 else "DEVICE and TARGET are missing, or --all",
            program="blktrack sync",
        )
    if args.jobs:
        raise Misused("--jobs is for --all", program="blktrack sync")
    return reminded(args, args.target, lambda: _run(args))


def _jobs(text: str) -> int:
    """argparse type: how many devices at a time."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number of at least 1")
    return int(text)


def _refuse_with_all(args: argparse.Namespace) -> None:
    """What is said of one replica here is said of each in the policy."""
    if args.device:
        raise Misused(
            f"with --all no DEVICE is named, and {args.device} was",
            program="blktrack sync",
            hint="its replicas are those of the policy; leave out --all to sync one",
        )
    one = {
        "--full": args.full,
        "--force": args.force,
        "--in-place": args.in_place,
        "--consistency": args.consistency,
        "--no-freeze": args.freeze is False,
        "--freeze-cap": args.freeze_cap,
        "--pre-freeze": args.pre_freeze,
        "--post-freeze": args.post_freeze,
    }
    if given := next((option for option, value in one.items() if value), None):
        raise Misused(
            f"{given} is for a single replica, and --all syncs many",
            program="blktrack sync",
            hint="say it in the policy, or sync that one by blktrack sync DEVICE TARGET",
        )


def _run(args: argparse.Namespace) -> int:
    link = load(paths().policy).link(args.device, args.target)
    options = capture_options(args, link.options() if link else None)
    options.full, options.force, options.no_resync = args.full, args.force, args.no_resync
    options.in_place |= args.in_place
    remote_options(args, options, args.target)
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
