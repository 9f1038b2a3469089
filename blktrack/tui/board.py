"""Draws a report: lines of at most a given width, as many as the terminal has at most.

Devices are drawn whole (rates, links, what is wrong, where the dirty blocks lie) if all of them
fit; if not, the chosen one is, and the others in one line, which then tells of the worst of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from blktrack.report import TopDevice, TopLink, TopReport
from blktrack.tui import look, words
from blktrack.tui.grid import WIDE, Cell, Column, columns, heading, row
from blktrack.tui.look import Glyphs, Line, clean, fit
from blktrack.tui.trend import Trend
from blktrack.units import format_size

_RANK = (look.GOOD, look.LATE, look.BAD)
_LATENESS = {"ok": look.GOOD, "late": look.LATE, "broken": look.BAD, "": look.PLAIN}
_LEAST_WIDTH = 76  # below it columns go over the edge
_INFO = 26  # cells at the end of a strip

# Name of an order, the column that it goes by, what it goes by, largest first.
Order = tuple[str, str, Callable[[TopDevice], float]]
ORDERS: tuple[Order, ...] = (
    ("name", "name", lambda _: 0.0),
    ("write rate", "write", lambda device: device.write_rate or 0.0),
    ("dirty rate", "new", lambda device: device.dirty_rate or 0.0),
    ("dirty bytes", "dirty", lambda device: device.dirty_bytes or 0),
    ("lag", "lag", lambda device: max((link.lag_s or 0.0 for link in device.links), default=-1.0)),
)


@dataclass
class View:
    """What the user chose to see."""

    order: int = 0
    reverse: bool = False
    chosen: str = ""  # a device
    paused: bool = False
    measuring: bool = False  # the kernel times the programs for us
    interval: float = 1.0
    message: str = ""


def ordered(devices: list[TopDevice], view: View) -> list[TopDevice]:
    """Names ascending, figures descending; or the other way round."""
    by_name = sorted(devices, key=lambda device: _natural(device.device))
    if view.order == 0:
        return by_name[::-1] if view.reverse else by_name
    measure = ORDERS[view.order][2]
    return sorted(by_name, key=measure, reverse=not view.reverse)


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """loop2 before loop10."""
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", path)]


@dataclass(frozen=True)
class _Frame:
    grid: list[Column]
    shapes: Glyphs
    trends: Mapping[str, Trend]
    width: int
    now: float


def draw(
    report: TopReport,
    trends: Mapping[str, Trend],
    view: View,
    shapes: Glyphs,
    *,
    width: int,
    height: int,
) -> list[Line]:
    """The whole screen. `trends` of write rates are by device."""
    devices = ordered(report.devices, view)
    names = [2 + cell_len(clean(device.device)) for device in devices]
    names += [4 + cell_len(_name(link)) for device in devices for link in device.links]
    grid = columns(width, max(names, default=0))
    frame = _Frame(grid, shapes, trends, width, report.time)
    marked = {"": look.FAINT, ORDERS[view.order][1]: look.SORTED}
    link_marked = {"": look.FAINT}
    lines = [
        _title(report, view, frame),
        heading(grid, shapes, marked, link=False),
        heading(grid, shapes, link_marked, link=True),
    ]
    room = max(height - len(lines) - 1, 1)
    body, shown = _body(devices, view, frame, room) if devices else (_nothing(frame), "")
    lines += body[:room]
    lines += [[] for _ in range(room - len(body))]
    lines = [*lines, _footer(view, shown, frame)][:height]
    return lines if width >= _LEAST_WIDTH else [look.cropped(line, width) for line in lines]


def _body(devices: list[TopDevice], view: View, frame: _Frame, room: int) -> tuple[list[Line], str]:
    """The lines of the devices, and which of them are seen if not all are."""
    index = next((i for i, d in enumerate(devices) if d.device == view.chosen), 0)
    whole = [_device(device, frame, i == index) for i, device in enumerate(devices)]
    if sum(map(len, whole)) + len(whole) - 1 <= room:
        return [line for block in whole for line in [*block, []]][:-1], ""
    if sum(map(len, whole)) <= room:
        return [line for block in whole for line in block], ""
    # All but the chosen without where the dirty blocks lie, or in a line each.
    blocks = [
        block[:-1] if i != index and devices[i].heat else block for i, block in enumerate(whole)
    ]
    if sum(map(len, blocks)) > room:
        blocks = [[_row(device, frame, words.verdict(device))] for device in devices]
        blocks[index] = whole[index]
    first, last = _window([len(block) for block in blocks], index, room)
    seen = f"{first + 1}-{last} of {len(blocks)}" if last - first < len(blocks) else ""
    return [line for block in blocks[first:last] for line in block], seen


def _window(heights: list[int], index: int, room: int) -> tuple[int, int]:
    """Which blocks are shown: that of `index`, and as many around it as there is room for."""
    first, last, used = index, index + 1, heights[index]
    while first > 0 and used + heights[first - 1] <= room:
        first -= 1
        used += heights[first]
    while last < len(heights) and used + heights[last] <= room:
        used += heights[last]
        last += 1
    return first, last


def _device(device: TopDevice, frame: _Frame, chosen: bool) -> list[Line]:
    """The last line is where the dirty blocks lie, if that is known."""
    own = words.own_verdict(device)
    lines = [_row(device, frame, own, chosen=chosen)]
    lines += _reason(device.reason, frame, _RANK[own.rank])
    for link in device.links:
        lines.append(_link(link, frame))
        lines += _reason(link.reason, frame, _RANK[words.rank_of_link(link)])
        lines += _reason(words.failure(link, frame.now), frame, look.LATE)
    if device.heat:
        lines.append(_strip(device, frame))
    return lines


def _row(device: TopDevice, frame: _Frame, verdict: words.Verdict, *, chosen: bool = False) -> Line:
    shapes = frame.shapes
    short = look.name(device.device, frame.grid[0].width - 2, shapes.cut)
    name = f"{shapes.chosen if chosen else ' '} {short}"
    trend = frame.trends.get(device.device)
    width = frame.grid[-1].width - 1
    cells: dict[str, Cell] = {
        "name": (name, look.CHOSEN if chosen else look.PLAIN),
        "state": (f"{_mark(verdict.rank, shapes)} {verdict.text}", _RANK[verdict.rank]),
        "write": (words.size(device.write_rate), look.PLAIN),
        "writes": (words.number(device.writes_rate), look.PLAIN),
        "new": (words.number(device.dirty_rate), look.PLAIN),
        "dirty": (words.size(device.dirty_bytes), look.PLAIN),
        "losses": (str(device.losses), look.BAD if device.losses else look.PLAIN),
        "cost": (words.nanoseconds(device.cost_ns), look.PLAIN),
        "trend": (f" {trend.draw(width, shapes)}" if trend and width else "", look.TREND),
    }
    return row(cells, frame.grid, shapes, link=False)


def _link(link: TopLink, frame: _Frame) -> Line:
    rank, shapes = words.rank_of_link(link), frame.shapes
    name = look.name(_name(link), frame.grid[0].width - 4, shapes.cut)
    point = words.clock(link.point, frame.now)
    if frame.width < WIDE and link.consistency:
        point += " fs" if link.consistency == "filesystem" else f" {link.consistency}"
    cells: dict[str, Cell] = {
        "name": (f" {shapes.link} {name}", look.PLAIN),
        "state": (f"{_mark(rank, shapes)} {words.STATES.get(link.state, link.state)}", _RANK[rank]),
        "lag": (words.age(link.lag_s), _LATENESS[link.lateness]),
        "rpo": (words.age(link.rpo_s), look.FAINT),
        "pending": (words.size(link.pending_bytes), look.PLAIN),
        "eta": (words.age(link.eta_s), look.PLAIN),
        "rate": (_rate(link.sync_rate), look.PLAIN),
        "consistency": (link.consistency or words.UNKNOWN, look.PLAIN),
        "point": (f" {point}", look.PLAIN),
    }
    return row(cells, frame.grid, shapes, link=True)


def _rate(rate: float | None) -> str:
    return words.UNKNOWN if rate is None else f"{format_size(rate)}/s"


def _name(link: TopLink) -> str:
    return clean(link.target or f"link {link.name}")


def _mark(rank: int, shapes: Glyphs) -> str:
    return (shapes.good, shapes.late, shapes.bad)[rank]


def _reason(text: str, frame: _Frame, style: Style) -> list[Line]:
    return [[Segment(f"    {part}", style)] for part in look.wrap(clean(text), frame.width - 4)[:2]]


def _strip(device: TopDevice, frame: _Frame) -> Line:
    """Where the dirty blocks lie, and what has no column of its own on a narrow terminal."""
    info = f"{format_size(device.size)}, {device.losses} lost"
    if frame.width >= WIDE:
        info = f"{format_size(device.size)} by {format_size(device.granularity)}"
    elif device.cost_ns is not None:
        info += f", {words.nanoseconds(device.cost_ns)}"
    room = max(frame.width - 4 - _INFO - 1, 1)
    cells = look.strip(device.heat, room, frame.shapes)
    end = fit(info, max(frame.width - 4 - room, 0), frame.shapes.cut, right=True)
    return [Segment("    ", look.PLAIN), *cells, Segment(end, look.FAINT)]


def _nothing(frame: _Frame) -> list[Line]:
    texts = ["no device is tracked; waiting for one", "blktrack track DEVICE begins"]
    return [[], *([Segment(f"  {text}"[: frame.width], look.FAINT)] for text in texts)]


def _title(report: TopReport, view: View, frame: _Frame) -> Line:
    line: Line = [Segment("blktrack top", look.TITLE)]
    if view.paused:
        line += [Segment("  ", look.PLAIN), Segment(" PAUSED ", look.BADGE)]
    line.append(Segment(f"  {words.summary(report)}", look.PLAIN))
    clock = words.clock(report.time, report.time)
    used = sum(segment.cell_length for segment in line)
    parts = [*words.rates(report), clock]
    # What there is no room for goes, the last but the clock first.
    while len(parts) > 1 and used + 2 + len("  ".join(parts)) > frame.width:
        parts.pop(-2)
    right = "  ".join(parts)
    if used + 2 + len(right) <= frame.width:
        line.append(Segment(" " * (frame.width - used - len(right)) + right, look.FAINT))
    return look.cropped(line, frame.width)


def _footer(view: View, shown: str, frame: _Frame) -> Line:
    order = f"{ORDERS[view.order][0]}{' reversed' if view.reverse else ''}"
    pause = "go on" if view.paused else "pause"
    left = f"q quit  p {pause}  s sort: {order}  {frame.shapes.arrows} choose  ? help"
    if view.message:
        left = view.message
    right = "  ".join(filter(None, (shown, f"+/- {view.interval:g} s")))
    space = frame.width - cell_len(left) - cell_len(right)
    text = f"{left}{' ' * space}{right}" if space >= 2 else left
    return look.cropped([Segment(text, look.FAINT)], frame.width)
