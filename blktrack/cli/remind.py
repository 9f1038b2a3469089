"""For schedules: an error that goes on as it was is told once, then now and then."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from blktrack.cli.common import paths
from blktrack.errors import BlktrackError, UsageError
from blktrack.told import Told, Trouble
from blktrack.units import parse_duration


def add_remind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remind",
        type=duration,
        metavar="TIME",
        default=0.0,
        help="with --quiet: what goes on as it was told is told again only after this long, as 4h "
        "(default 0, each time); exit codes stay as they are",
    )


def duration(text: str) -> float:
    """argparse type: seconds."""
    try:
        return parse_duration(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error}; {error.hint}") from error


def reminded(args: argparse.Namespace, about: str, work: Callable[[], int]) -> int:
    """The exit code of `work`; its error too, if it is one that was told already."""
    if not args.quiet:
        return work()
    told = Told(paths(), args.remind)
    try:
        code = work()
    except BlktrackError as error:
        found = {about: Trouble(error.exit_code, str(error))}
        news = told.is_news(found)
        told.record(found, found, told=news)
        if news:
            raise
        return error.exit_code
    told.record({}, [about], told=False)
    return code
