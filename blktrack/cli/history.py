"""Show what the last syncs and sends of a device did, the newest last: what was looked at and
shipped, in how many rounds, how long file systems were frozen, and why a run failed. One that was
killed has left no line.

  blktrack history /dev/sdb
  blktrack history /dev/sdb --target /backup/sdb.img --failed
  blktrack history /dev/sdb --last 500 --json
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
import time

from blktrack import history
from blktrack.cli.common import add_json, emit, replica, store
from blktrack.errors import Busy, UsageError
from blktrack.report import HistoryReport, Run
from blktrack.ship.address import short_name
from blktrack.tracker.tracker import find_any
from blktrack.units import format_duration, format_size

EXITS = {"3": "the device is not known"}

_WIDTH = 80  # columns, where no terminal says otherwise
_NARROWEST = 8  # of the replica's name
_HEAD = ("when", "replica", "mode", "changed", "shipped", "rounds", "freeze", "time", "result")
_REPLICA, _NUMBERS = 1, range(3, 8)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="a device that is or was tracked")
    parser.add_argument(
        "--target", metavar="T", type=replica, help="only runs to this replica: path or name"
    )
    parser.add_argument(
        "--last", type=_count, metavar="N", default=20, help="so many runs (default: %(default)s)"
    )
    parser.add_argument("--failed", action="store_true", help="only runs that did not end well")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    report = _look(args)
    if report.damaged:
        lines = "line is" if report.damaged == 1 else "lines are"
        print(
            f"blktrack: warning: {report.damaged} damaged {lines} left out of the history of"
            f" {report.device}",
            file=sys.stderr,
        )
    if args.json:
        emit(report)
    elif report.runs:
        print(_table(report.runs, shutil.get_terminal_size((_WIDTH, 24)).columns))
    else:
        which = "failed run" if args.failed else "run"
        print(f"no {which} of {args.target or report.device} is on record")
    return 0


def _look(args: argparse.Namespace) -> HistoryReport:
    of = store()
    state, _ = find_any(of, args.device)
    found = history.read(of, state.id)
    runs = found.runs
    if args.target is not None:
        runs = [run for run in runs if args.target in (run.target, run.link)]
        if not runs and not any(args.target in (x.target, x.name) for x in of.links(state.id)):
            raise UsageError(
                f"{args.device} has no replica {args.target}", hint="see blktrack status"
            )
    if args.failed:
        runs = [run for run in runs if run.exit]
    return HistoryReport(args.device, runs[-args.last :], found.damaged)


def _table(runs: list[Run], width: int) -> str:
    """Aligned columns; the replica's name gives way where they are too wide."""
    rows = [_HEAD, *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    others = sum(widths) - widths[_REPLICA] + len(widths) - 1
    widths[_REPLICA] = min(widths[_REPLICA], max(width - others, _NARROWEST))
    lines = [_line(_HEAD, widths)]
    for run, row in zip(runs, rows[1:], strict=True):
        lines.append(_line(row, widths))
        if run.error:
            lines.append(_fill(run.error, width))
    return "\n".join(lines)


def _row(run: Run) -> tuple[str, ...]:
    when = time.strftime("%b %d %H:%M", time.localtime(run.begun))
    replica = run.link or short_name(run.target)
    if run.exit:
        figures = ["-"] * 4
    else:
        figures = [
            format_size(run.bytes_changed),
            format_size(run.bytes_shipped),
            str(run.rounds),
            format_duration(run.freeze_s) if run.freeze_s else "-",
        ]
    return (when, replica, run.mode or "-", *figures, format_duration(run.duration_s), _result(run))


def _result(run: Run) -> str:
    if run.exit == Busy.exit_code:
        return "busy"
    return f"exit {run.exit}" if run.exit else "ok"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if column in _NUMBERS else _cut(cell, width).ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return " ".join(cells).rstrip()


def _cut(text: str, width: int) -> str:
    """Names that are too long mostly differ at their end."""
    return text if len(text) <= width else f"~{text[len(text) - width + 1 :]}"


def _fill(text: str, width: int) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _count(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number of runs")
    return int(text)
