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
        help="what a point must be: crash, a state that pulling the plug could have left "
        "(default); filesystem, one that mounts cleanly, by a short freeze; none, whatever was "
        "read while writes went on",
    )
    parser.add_argument(
        "--no-freeze",
        dest="freeze",
        action="store_const",
        const=False,
        help="never freeze file systems for a crash point that is not to be had without",
    )
    parser.add_argument(
        "--freeze-cap",
        type=_cap,
        metavar="SECONDS",
        help=f"end a freeze after this long, without a point (default {CAP:g}, at most "
        f"{CAP_MOST:g})",
    )
    parser.add_argument(
        "--pre-freeze",
        action="append",
        metavar="CMD",
        help="run this before a freeze, to have a database write all it has, say; with "
        "--consistency filesystem always, even if nothing is mounted. If it fails there is no "
        "point. It finds BLKTRACK_PHASE and BLKTRACK_DEVICE in its environment. May be repeated",
    )
    parser.add_argument(
        "--post-freeze",
        action="append",
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
            f"{text!r} is not a number of seconds above 0 and at most {CAP_MOST:g}"
        )
    return value


def capture_options(args: argparse.Namespace, policy: Options | None = None) -> Options:
    """What the command line asks for, over what the policy does. UsageError if it contradicts
    itself."""
    options = policy or Options()
    if args.consistency is not None:
        options.consistency = args.consistency
    if args.freeze is not None:
        options.freeze = args.freeze
    if args.freeze_cap is not None:
        options.cap = args.freeze_cap
    if args.pre_freeze is not None:
        options.pre = tuple(args.pre_freeze)
    if args.post_freeze is not None:
        options.post = tuple(args.post_freeze)
    if args.limit is not None:
        options.limit = args.limit
    _refuse_contradictions(args, options)
    return options


def _refuse_contradictions(args: argparse.Namespace, options: Options) -> None:
    """A hook that would never run, or a freeze that is both asked for and forbidden."""
    if options.consistency == "filesystem" and not options.freeze:
        raise UsageError(
            "--consistency filesystem needs the freeze that --no-freeze forbids",
            hint="leave one of them out",
        )
    if options.consistency == "none" or not options.freeze:
        if args.pre_freeze or args.post_freeze:
            why = "--consistency none" if options.freeze else "--no-freeze"
            raise UsageError(
                f"with {why} nothing is frozen, and no hook would run",
                hint=f"leave out {why}, or --pre-freeze and --post-freeze",
            )
        options.pre = options.post = ()
