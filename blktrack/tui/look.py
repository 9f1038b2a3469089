"""What things look like: styles, and glyphs for terminals with and without Unicode."""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.segment import Segment
from rich.style import Style

from blktrack.errors import UsageError
from blktrack.ship.address import Address, is_remote

Line = list[Segment]

PLAIN = Style()
TITLE = Style(bold=True)
FAINT = Style(dim=True)
CHOSEN = Style(bold=True)
SORTED = Style(bold=True, underline=True)
BADGE = Style(reverse=True, bold=True)
GOOD = Style(color="green")
LATE = Style(color="yellow")
BAD = Style(color="red", bold=True)
TREND = Style(color="cyan")
HEAT = (FAINT, Style(color="blue"), Style(color="cyan"), Style(color="cyan"), Style(color="yellow"))

_LEAST_PATH = 5  # cells of the path on another host that tell anything
# Shares from which on a part of a device is drawn darker; anything dirty is drawn.
_SHADES = (0.0, 0.05, 0.25, 0.75)


@dataclass(frozen=True)
class Glyphs:
    """`levels`: nothing, then ever more; `shades`: clean, then ever more of it dirty."""

    levels: str
    shades: str
    chosen: str
    link: str
    good: str
    late: str
    bad: str
    cut: str
    between: str
    arrows: str


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "·░▒▓█", "▸", " →", "●", "▲", "✖", "…", "·", "↑↓")
ASCII = Glyphs("_.:-=+*#", ".-+*#", ">", "->", "*", "!", "X", "~", "-", "up/down")


def glyphs(environment: Mapping[str, str] | None = None) -> Glyphs:
    """Those that the locale's encoding has, as the user set it: Python makes the C locale UTF-8
    where it can, and says so in its own environment, but that changes no terminal."""
    values = _first_environment() if environment is None else environment
    locale = next(filter(None, map(values.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    return UNICODE if "utf8" in locale.lower().replace("-", "") else ASCII


def _first_environment() -> dict[str, str]:
    try:
        raw = Path("/proc/self/environ").read_bytes()
    except OSError:
        return dict(os.environ)
    pairs = (entry.partition("=") for entry in os.fsdecode(raw).split("\0"))
    return {name: value for name, _, value in pairs}


def clean(text: str) -> str:
    """A name from outside, with nothing in it that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def name(path: str, width: int, cut: str) -> str:
    """A path in at most `width` cells: without /dev if need be, then without its beginning. Of one
    on another host, that stays as long as there is room for more."""
    if is_remote(path) and cell_len(clean(path)) > width:
        return _elsewhere(path, width, cut)
    text = clean(path)
    if cell_len(text) > width:
        text = text.removeprefix("/dev/")
    return text if cell_len(text) <= width else fit(text, width, cut)


def _elsewhere(target: str, width: int, cut: str) -> str:
    """`vault.example.com:/b/disk.img`, `vault:/b/disk.img`, `vault:…disk.img`, `vau…`."""
    try:
        address = Address.parse(target)
    except UsageError:  # a later version's
        return fit(clean(target), width, cut)
    host, path = clean(address.host), clean(address.path)
    label = host.partition(".")[0]
    short = host if ":" in host or label.isdigit() else label  # of a number all is told
    for whole in (f"{host}:{path}", f"{short}:{path}"):
        if cell_len(whole) <= width:
            return whole
    room = width - cell_len(short) - 1
    if room >= _LEAST_PATH:
        return f"{short}:{fit(path, room, cut)}"
    return short if cell_len(short) <= width else set_cell_size(short, max(width - 1, 0)) + cut


def fit(text: str, width: int, cut: str, *, right: bool = False) -> str:
    """Exactly `width` cells; of a name that is too long its end is kept, which tells more."""
    length = len(text) if text.isascii() else cell_len(text)
    if length > width:
        while text and cell_len(text) > width - 1:
            text = text[1:]
        text = cut + text if width > 0 else ""
        length = cell_len(text)
    pad = " " * (width - length)
    return pad + text if right else text + pad


def cropped(line: Line, width: int) -> Line:
    """No more than `width` cells of a line."""
    found: Line = []
    for segment in line:
        room = width - sum(part.cell_length for part in found)
        if segment.cell_length > room:
            segment = Segment(set_cell_size(segment.text, max(room, 0)), segment.style)
        found.append(segment)
    return [segment for segment in found if segment.text]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces where there are some."""
    width = max(width, 1)
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and cell_len(line) + 1 + cell_len(word) <= width:
            line = f"{line} {word}"
            continue
        *before, last = chop_cells(word, width)
        lines += ([line] if line else []) + before
        line = last
    return [*lines, line] if line else lines


def strip(shares: list[float], width: int, shapes: Glyphs) -> Line:
    """The parts of a device side by side; each cell as dirty as the dirtiest of its parts."""
    if not shares or width < 1:
        return []
    shades = [bisect.bisect_left(_SHADES, share) for share in shares]
    darkest = [max(shades[first:last]) for first, last in _parts(len(shares), width)]
    return [
        Segment(shapes.shades[shade] * len(list(same)), HEAT[shade])
        for shade, same in itertools.groupby(darkest)
    ]


@functools.lru_cache(maxsize=16)
def _parts(count: int, width: int) -> list[tuple[int, int]]:
    """Which of `count` parts each of `width` cells stands for."""
    firsts = [cell * count // width for cell in range(width + 1)]
    return [(first, max(last, first + 1)) for first, last in itertools.pairwise(firsts)]
