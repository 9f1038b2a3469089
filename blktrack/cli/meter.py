"""How far an operation is, how fast it goes and how long it still takes. Draws nothing."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from blktrack.observer import HUSHED
from blktrack.units import format_rate, format_size

_WINDOW = 15.0  # seconds over which a rate is measured
_SAMPLES = 0.5  # seconds between two samples at least
_SURE = 3.0  # seconds of a phase before anything is told of its end: what is buffered comes first


@dataclass(frozen=True)
class Reading:
    """What a meter says at one moment. Bytes and seconds."""

    phase: str  # "" before the first
    count: int
    total: int  # 0 if nobody knows
    rate: float | None  # of late; None if bytes are not counted, or not yet long enough
    left: float | None  # seconds to the end of the phase; None if nobody can tell
    elapsed: float  # in this phase
    hushed: bool  # nothing may be written now

    @property
    def figures(self) -> str:
        """All but the phase."""
        if not self.count:
            return f"{_clock(self.elapsed)} so far"
        part = f"{format_size(self.count)} of {format_size(self.total)}"
        words = [part if self.total else format_size(self.count)]
        if self.rate is not None:
            words.append(format_rate(self.rate, 1))
        if self.left is not None:
            words.append(f"{_clock(self.left)} to go")
        return ", ".join(words)


class Meter:
    """An Observer that remembers. Its readings may be taken by another thread, which holds `gate`
    while it writes what they say: FREEZE and ASKING then begin after that."""

    def __init__(self, label: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.label = label  # which of several operations it is
        self.gate = threading.Lock()
        self.warnings: list[str] = []
        self._clock = clock
        self._name, self._count, self._total = "", 0, 0
        self.born = self._begun = clock()
        self._samples: deque[tuple[float, int]] = deque()

    def phase(self, name: str, total: int) -> None:
        with self.gate:
            self._name, self._count, self._total = name, 0, total
            self._begun = self._clock()
            self._samples = deque([(self._begun, 0)])

    def done(self, count: int) -> None:
        now, samples = self._clock(), self._samples
        self._count = count
        self._total = self._total and max(self._total, count)
        if samples and now - samples[-1][0] >= _SAMPLES:
            samples.append((now, count))
            # One stays that is older than the window.
            while len(samples) > 1 and samples[1][0] <= now - _WINDOW:
                samples.popleft()

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def reading(self) -> Reading:
        now, count, total = self._clock(), self._count, self._total
        elapsed = now - self._begun
        rate = left = None
        since, before = self._oldest(now)
        if count and now - since >= 1.0:
            rate = (count - before) / (now - since)
            if total and rate > 0 and elapsed >= _SURE:
                left = (total - count) / rate
        return Reading(self._name, count, total, rate, left, elapsed, self._name in HUSHED)

    def _oldest(self, now: float) -> tuple[float, int]:
        """The last sample that is older than the window, or else the first. Where nothing is done
        for a while that is the newest, and the rate comes to nothing."""
        samples = list(self._samples)
        old = [sample for sample in samples if sample[0] <= now - _WINDOW]
        return (old or samples or [(now, 0)])[-1 if old else 0]


def _clock(seconds: float) -> str:
    """`12 s`, `3:05`, `2:03:05`: no more exact than a guess is."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
