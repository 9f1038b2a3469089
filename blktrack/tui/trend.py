"""The last minutes of a rate, for a sparkline that stands still.

Columns are fixed stretches of time, so that only the newest changes from refresh to refresh: that
is calmer to look at than a line that moves each second, and costs a slow terminal line nothing.
"""

from __future__ import annotations

import math

from blktrack.tui.look import Glyphs

SPAN = 300  # seconds shown, or a little more
_STEPS = (5, 10, 15, 20, 30, 60, 150, 300)  # seconds a column
_BUCKET = _STEPS[0]
_KEPT = 2 * SPAN // _BUCKET


def step_of(width: int) -> int:
    """Seconds that one of `width` columns stands for."""
    return next((step for step in _STEPS if step * width >= SPAN), _STEPS[-1])


class Trend:
    """Means of a rate by stretches of time."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, int]] = {}  # by number of the bucket
        self._newest = 0
        self._past: list[float | None] = []  # all columns but the newest, which no longer change
        self._past_of = (0, 0)

    def add(self, at: float, rate: float) -> None:
        """at -- seconds since the epoch."""
        number = int(at // _BUCKET)
        total, count = self._sums.get(number, (0.0, 0))
        self._sums[number] = (total + rate, count + 1)
        self._newest = number
        for old in [key for key in self._sums if not number - _KEPT < key <= number]:
            del self._sums[old]

    def columns(self, width: int) -> list[float | None]:
        """The newest last; None where nothing was measured."""
        buckets = step_of(width) // _BUCKET
        last = self._newest // buckets
        if self._past_of != (width, last):
            before = range(last - width + 1, last)
            self._past = [self._mean(column * buckets, buckets) for column in before]
            self._past_of = (width, last)
        return [*self._past, self._mean(last * buckets, buckets)]

    def _mean(self, first: int, buckets: int) -> float | None:
        numbers = range(first, first + buckets)
        known = [self._sums[number] for number in numbers if number in self._sums]
        count = sum(part[1] for part in known)
        return sum(part[0] for part in known) / count if count else None

    def draw(self, width: int, shapes: Glyphs) -> str:
        """One glyph a column. The scale ends at a power of two, so that it seldom changes."""
        columns = self.columns(width)
        peak = max((value for value in columns if value), default=0.0)
        top = 2.0 ** math.ceil(math.log2(peak)) if peak > 0 else 1.0
        highest = len(shapes.levels) - 1
        text = ""
        for value in columns:
            if value is None:
                text += " "
            elif value <= 0:
                text += shapes.levels[0]
            else:
                text += shapes.levels[max(1, math.ceil(highest * value / top))]
        return text
