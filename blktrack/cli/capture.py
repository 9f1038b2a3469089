"""The arguments of what reads a device while it is written: which point, and how to freeze."""

from __future__ import annotations

import argparse
import math

from blktrack.errors import UsageError
from blktrack.options import Options
from blktrack.quiesce.freeze import CAP, CAP_MOST


def add_capture(parser: argparse.ArgumentParser) -> None:
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


def capture_options(args: argparse.Namespace) -> Options:
    """UsageError if they contradict each other."""
    options = Options(
        consistency=args.consistency,
        freeze=not args.no_freeze,
        cap=args.freeze_cap,
        pre=tuple(args.pre_freeze),
        post=tuple(args.post_freeze),
        limit=args.limit,
    )
    _refuse_contradictions(options)
    return options


def _refuse_contradictions(options: Options) -> None:
    """A hook that would never run, or a freeze that is both asked for and forbidden."""
    if options.consistency == "filesystem" and not options.freeze:
        raise UsageError("--consistency filesystem needs the freeze that --no-freeze forbids")
    if (options.pre or options.post) and (options.consistency == "none" or not options.freeze):
        why = "--consistency none" if options.freeze else "--no-freeze"
        raise UsageError(f"with {why} nothing is frozen, and no hook would run")
