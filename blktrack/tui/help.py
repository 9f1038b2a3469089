"""The page behind `?`."""

from __future__ import annotations

from rich.segment import Segment

from blktrack.tui.look import FAINT, PLAIN, TITLE, Glyphs, Line, cropped

_KEYS = (
    ("q, Ctrl-C", "quit"),
    ("p, space", "pause and go on; readings are taken all the same"),
    ("s, r", "next order of the devices; reverse it"),
    ("j k, {arrows}", "choose a device: it is drawn whole where not all are"),
    ("+ -", "refresh less often, more often"),
    ("c", "have the kernel time the programs, about 45 ns more for each run"),
)
_FIGURES = (
    ("DIRTY/s", "granules that became dirty a second, at least so many"),
    ("DIRTY", "bytes that changed since the last drain"),
    ("LAG, RPO", "age of the replica's point, and what the policy promises"),
    ("TO GO, ETA", "what the next sync ships, and its time at the rate of the last"),
    ("LOST", "marks that were lost: the next sync is a resync"),
    ("COST", "of both programs for one change; - where it is not timed"),
)


def page(width: int, height: int, shapes: Glyphs) -> list[Line]:
    """As many lines as there is room for; `strip` explains itself by its glyphs."""
    lines: list[Line] = [[Segment("blktrack top", TITLE), Segment("  keys", PLAIN)], []]
    lines += [_entry(key.format(arrows=shapes.arrows), text) for key, text in _KEYS]
    lines += [[], [Segment("what is shown", TITLE)], []]
    lines += [_entry(key, text) for key, text in _FIGURES]
    legend = f"where the dirty blocks lie, from clean to full: {' '.join(shapes.shades)}"
    lines += [_entry("last line", legend), []]
    marks = f"{shapes.good} well   {shapes.late} late or waiting   {shapes.bad} needs you"
    lines.append([Segment(f"  {marks}", PLAIN)])
    lines = lines[: max(height - 1, 0)]
    lines += [[] for _ in range(height - 1 - len(lines))]
    lines = [*lines, [Segment("any key goes back", FAINT)]][:height]
    return [cropped(line, width) for line in lines]


def _entry(key: str, text: str) -> Line:
    return [Segment(f"  {key:14}", TITLE), Segment(text, PLAIN)]
