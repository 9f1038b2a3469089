"""Arguments for a replica on another host, and how long a run may take."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Literal

from blktrack.cli.remind import duration
from blktrack.errors import UsageError
from blktrack.options import Options
from blktrack.ship.address import is_remote
from blktrack.ship.wire.hello import LEAST_PATIENCE, MOST_PATIENCE, PATIENCE
from blktrack.ship.wire.pace import FIXED_MOST
from blktrack.units import format_promise


def add_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retry-for",
        type=duration,
        metavar="TIME",
        help="of another host: try a lost connection again until nothing has come across for so "
        f"long, as 10m (default {format_promise(Options().retry_for)}); 0: never",
    )
    parser.add_argument(
        "--time-limit",
        type=_limit,
        metavar="TIME",
        help="give up after so long, as 4m, with exit code 4; the next run goes on",
    )
    parser.add_argument(
        "--compress",
        type=compression,
        metavar="LEVEL",
        help="to another host: none, a level of zstd from 1, fast, to "
        f"{FIXED_MOST}, small, or adapt (default): what suits link and processors by now",
    )
    parser.add_argument(
        "--peer-timeout",
        type=_patience,
        metavar="TIME",
        help="take another host for dead after so long without a word (default "
        f"{format_promise(PATIENCE)})",
    )


def remote_options(args: argparse.Namespace, options: Options, target: str | None = None) -> None:
    """Put into `options` what the command line asks for. UsageError if that makes no sense for
    `target`; None: it is for many."""
    elsewhere = target is None or is_remote(target)
    given = {
        "--retry-for": args.retry_for,
        "--compress": args.compress,
        "--peer-timeout": args.peer_timeout,
    }
    if not elsewhere and (odd := next((o for o, v in given.items() if v is not None), None)):
        raise UsageError(
            f"{odd} is for a replica on another host, and {target} is on this one",
            hint=f"leave out {odd}, or name the replica as ssh://HOST/PATH",
        )
    if args.retry_for is not None:
        options.retry_for = args.retry_for
    if args.compress is not None:
        options.compress = args.compress
    if args.peer_timeout is not None:
        options.patience = args.peer_timeout
    if target is not None and args.time_limit is not None:  # of many it is for all together
        options.time_limit = args.time_limit
    # Of many at once none may ask: nobody would know for which.
    options.interactive = target is not None and _is_watched(quiet=args.quiet)


def _is_watched(*, quiet: bool) -> bool:
    """Whether somebody is there to answer: standard input may be closed."""
    try:
        return not quiet and os.isatty(sys.stdin.fileno()) and os.isatty(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return False


def compression(text: str) -> int | Literal["none", "adapt"]:
    """argparse type: how to compress."""
    if text == "none":
        return "none"
    if text == "adapt":
        return "adapt"
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= FIXED_MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither none nor adapt, and no level from 1 to {FIXED_MOST}"
        )
    return int(text)


def _limit(text: str) -> float:
    """argparse type: seconds, more than none."""
    value = duration(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} leaves no time at all")
    return value


def _patience(text: str) -> float:
    """argparse type: seconds that both sides of a connection take."""
    value = duration(text)
    if not LEAST_PATIENCE <= value <= MOST_PATIENCE:
        least, most = format_promise(LEAST_PATIENCE), format_promise(MOST_PATIENCE)
        raise argparse.ArgumentTypeError(f"{text!r} is not from {least} to {most}")
    return value
