"""The columns of the display: one grid for the rows of devices and for those of their links."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.segment import Segment
from rich.style import Style

from blktrack.tui.look import PLAIN, Glyphs, Line, fit
from blktrack.tui.trend import SPAN, step_of

WIDE = 108  # from here on losses, cost and the last sync's rate have columns of their own
_LEAST_NAME, _MOST_NAME = 16, 44
_LEAST_TREND, _MOST_TREND = 14, SPAN // 5

Cell = tuple[str, Style]


@dataclass(frozen=True)
class Column:
    """`key` names a cell of a device's row, `link` one of a link's."""

    key: str
    heading: str
    link: str
    link_heading: str
    width: int
    right: bool = True


def columns(width: int, longest: int) -> list[Column]:
    """Those for a terminal of that width; `longest` is the longest name to be shown, in cells."""
    wide = width >= WIDE
    middle = [
        Column("state", "STATE", "state", "STATE", 12 if wide else 10, right=False),
        Column("write", "BYTES/s", "lag", "LAG", 9 if wide else 8),
        Column("writes", "WRITES/s" if wide else "WR./s", "rpo", "RPO", 8 if wide else 7),
        Column("new", "DIRTY/s", "pending", "TO GO", 8),
        Column("dirty", "DIRTY", "eta", "ETA", 8),
    ]
    if wide:
        middle += [
            Column("losses", "LOST", "rate", "LAST SYNC", 10),
            Column("cost", "COST", "consistency", "CONSISTENCY", 11),
        ]
    left = width - sum(column.width + 1 for column in middle) - 2  # two blanks before the trend
    name = max(min(longest, _MOST_NAME, max(left * 3 // 5, left - _MOST_TREND)), _LEAST_NAME)
    name = max(min(name, left - _LEAST_TREND), 8)
    trend = max(min(left - name, _MOST_TREND), 0)
    minutes = max(round(trend * step_of(trend) / 60), 1) if trend else 0
    return [
        Column("name", "  DEVICE", "name", "    REPLICA", name, right=False),
        *middle,
        Column("trend", f" LAST {minutes} MIN", "point", " POINT", trend + 1, right=False),
    ]


def row(cells: Mapping[str, Cell], grid: list[Column], shapes: Glyphs, *, link: bool) -> Line:
    """One line of the grid; a cell that is not given is empty."""
    line: Line = []
    for column in grid:
        text, style = cells.get(column.link if link else column.key, ("", PLAIN))
        if line:
            line.append(Segment(" ", PLAIN))
        line.append(Segment(fit(text, column.width, shapes.cut, right=column.right), style))
    return line


def heading(grid: list[Column], shapes: Glyphs, styles: Mapping[str, Style], *, link: bool) -> Line:
    """The names of the columns, in the style that `styles` has for one, else in that for ""."""
    cells = {
        (column.link if link else column.key): (
            column.link_heading if link else column.heading,
            styles.get("" if link else column.key, styles[""]),
        )
        for column in grid
    }
    return row(cells, grid, shapes, link=link)
