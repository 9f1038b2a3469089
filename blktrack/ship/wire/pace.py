"""How hard to compress, so that processors and link end together.

A batch costs the processors compressing and the link sending what that leaves of it. Side by side
the slower of both sets the pace, so the best level is the one for which the worse of

    seconds of compressing per byte / processors      and      stored part / bytes per second

is least. Both terms come from what was measured on the way: the second through the link's rate as
the senders see it, so that ssh, a slow receiver and a limit count as link.

Levels that were not tried lately are judged by the one in use. On a logarithmic scale their stored
parts are about proportional, whatever the data is (nothing is gained from random bytes at any
level), and so is what they cost.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from blktrack.units import MIB

Setting = int | Literal["none", "adapt"]  # a zstd level, no compression, or whatever is best

FIXED_MOST = 19  # zstd's highest level without options of its own


class _Rung(NamedTuple):
    """A level worth using, with what is typical of it next to level 1."""

    level: int | None
    gain: float  # logarithm of raw/stored
    cost: float  # seconds of compressing per byte


# Of pages of a database and of text; the levels between gain next to nothing, and those above need
# much time, and memory, for the last few percent.
_RUNGS = (
    _Rung(None, 0.0, 0.0),
    _Rung(-50, 0.4, 0.5),
    _Rung(-10, 0.7, 0.7),
    _Rung(1, 1.0, 1.0),
    _Rung(3, 1.03, 1.4),
    _Rung(6, 1.08, 3.6),
    _Rung(9, 1.1, 6.0),
    _Rung(12, 1.12, 13.0),
)
_START = 3  # the rung of level 1

_GAIN, _COST = math.log(3), 4e-9  # of level 1, before anything was measured
_LINK = 50e6  # bytes per second: likewise; a rate that no choice is very wrong for
_MEMORY = 4 * MIB  # so much of the latest data counts most
_TRUST = 4.0  # a batch that was sent many times faster counts as so many times
_LINK_MOST = 1.25e9  # and that much is more than ssh can do
_BUFFER = 2 * MIB  # of what was sent counts most: pipes, ssh and TCP take about so much at once
_FULL = 0.7  # part of the time
_SEARCH, _SEARCH_MOST = 64 * MIB, 512 * MIB  # of data while which a rate may seem e times as high
_DRIFT = 0.25  # part of a surprise that is put down to the level and not to the data
_SPAN = 3.0  # how far from what is typical a level may be, either way
_SHARP = 3.0  # the slower counts; where they are near, that each waits for the other at times too
_STAY = 0.02  # what is better by less is not worth a change
_PROBE = 8  # choices after which a neighbour is looked at
_RARELY = 64  # and where that never pays
_NEAR = 1.25  # a neighbour that looks worse than so is looked at rarely from the beginning
_UNDER_WAY = 4  # batches: one of each thread
_NOTES = 8  # batches over which the course of the whole is averaged
_NOTHING = 1e-12  # so little is no measure of a factor


class Level:
    """Chooses the level for each batch. Threads may use it side by side.

    A thread asks choose(), compresses, sends under a lock, and tells note() what that took.
    """

    def __init__(
        self,
        setting: Setting = "adapt",
        *,
        processors: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """processors -- that compress at the same time: those of this process, and the threads
        that compress, at most.

        ValueError for a level that is none.
        """
        if isinstance(setting, int) and not 1 <= setting <= FIXED_MOST:
            raise ValueError(f"{setting} is not a level from 1 to {FIXED_MOST}")
        self._setting = setting
        self._processors = processors or min(4, len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._link = _Link()
        self._course = _Course(clock)
        self._gain = _Profile(_GAIN, [rung.gain for rung in _RUNGS])
        self._cost = _Profile(_COST, [rung.cost for rung in _RUNGS])
        self._now = _START
        self._wait = self._patience = _PROBE
        self._settling = 0
        self._up = True  # where the next look goes

    def choose(self) -> int | None:
        """The level for the next batch; None to send it as it is."""
        if self._setting == "none":
            return None
        if self._setting != "adapt":
            return self._setting
        with self._lock:
            self._course.begin()
            self._wait -= 1
            rung = self._now if self._wait > 0 else self._neighbour()
            return _RUNGS[rung].level

    def note(
        self, level: int | None, raw: int, stored: int, compress_s: float, send_s: float
    ) -> None:
        """What became of a batch: its bytes, those that were sent, and seconds by the clock.

        stored -- `raw` if it was sent as it is, also where compressing it was in vain.
        compress_s -- 0.0 for level None.
        send_s -- with waits for a limit, without those for other senders.
        """
        if self._setting != "adapt" or raw <= 0:
            return
        rung = next(i for i, rung in enumerate(_RUNGS) if rung.level == level)
        with self._lock:
            weight = 1 - math.exp(-raw / _MEMORY)
            self._course.end(compress_s, send_s)
            self._link.note(raw, stored, send_s, full=self._course.sending > _FULL)
            if level is not None:
                # Our own threads, if they are more than the processors, slowed each other.
                alone = compress_s / max(1.0, self._course.threads / self._processors)
                self._cost.note(rung, alone / raw, weight)
                self._gain.note(rung, math.log(raw / min(stored, raw)), weight)
            self._settle()

    def _settle(self) -> None:
        times = [self._time(rung) for rung in range(len(_RUNGS))]
        best = min(range(len(_RUNGS)), key=times.__getitem__)
        self._settling -= 1
        if self._settling <= 0 and times[best] < times[self._now] * (1 - _STAY):
            # The batches under way were chosen for before: what comes of this is not known yet.
            self._now = min(max(best, self._now - 1), self._now + 2)
            self._settling = _UNDER_WAY
            self._wait = self._patience = _PROBE

    def _time(self, rung: int) -> float:
        """Seconds per byte that the whole would take at a level."""
        compressing = self._cost.at(rung) / self._processors
        sending = math.exp(-self._gain.at(rung)) / self._link.rate
        return math.pow(compressing**_SHARP + sending**_SHARP, 1 / _SHARP)

    def _neighbour(self) -> int:
        """The rung above or below, in turns, to see whether it is still as it was."""
        self._up = not self._up or self._now == 0
        rung = min(max(self._now + (1 if self._up else -1), 0), len(_RUNGS) - 1)
        near = self._time(rung) < _NEAR * self._time(self._now)
        self._patience = min(_RARELY, self._patience * (1 if near and self._now else 2))
        self._wait = self._patience
        # Without a look nothing is learned of the data; else one that costs much teaches little.
        return rung if near or self._now == 0 else self._now


class _Link:
    """Bytes per second, as the senders see it.

    What a buffer before the link takes at once looks like a fast link. Senders that wait nearly all
    the time have measured it; from there on those that do not may raise the rate, slowly.
    """

    def __init__(self) -> None:
        self._bytes = float(_BUFFER)
        self._seconds = _BUFFER / _LINK
        self._measured = math.inf  # when it was full
        self._before = 0.0  # and the time before that
        self._since = 0  # bytes of data since
        self._search = _SEARCH

    @property
    def rate(self) -> float:
        return self._bytes / self._seconds

    def note(self, raw: int, count: int, seconds: float, *, full: bool) -> None:
        most = min(_TRUST * self.rate, _LINK_MOST)
        if full:
            self._since = 0
        else:
            if self._since == 0 and self._measured < math.inf:
                found = self._measured > 2 * self._before
                self._search = _SEARCH if found else min(2 * self._search, _SEARCH_MOST)
                self._before = self._measured
            most = min(most, self._measured * math.exp(min(50.0, self._since / self._search)))
            self._since += raw
        keep = math.exp(-count / _BUFFER)
        self._bytes = self._bytes * keep + count
        self._seconds = self._seconds * keep + max(seconds, count / most)
        if full:
            self._measured = self.rate


class _Course:
    """What the threads did lately, while any was at work: a pause between is nobody's slowness."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = 0.0
        self._inside = 0  # threads between choose() and note()
        self._compressing = self._sending = self._passed = 0.0

    def begin(self) -> None:
        if self._inside == 0:
            self._last = self._clock()
        self._inside += 1

    def end(self, compress_s: float, send_s: float) -> None:
        now, keep = self._clock(), 1 - 1 / _NOTES
        self._passed = self._passed * keep + now - self._last
        self._compressing = self._compressing * keep + compress_s
        self._sending = self._sending * keep + send_s
        self._inside = max(0, self._inside - 1)
        self._last = now

    @property
    def threads(self) -> float:
        """How many compressed at a time."""
        return self._compressing / max(self._passed, _NOTHING)

    @property
    def sending(self) -> float:
        """The part of the time in which one of them was sending."""
        return self._sending / max(self._passed, _NOTHING)


class _Profile:
    """A quantity that depends on the data, as one number, and on the rung, as a factor."""

    def __init__(self, base: float, typical: list[float]) -> None:
        self._base = base
        self._typical = typical
        self._factor = list(typical)
        self._seen = [0.0] * len(typical)
        self._seen[_START] = 1 / _DRIFT  # the others are next to it

    def at(self, rung: int) -> float:
        return self._base * self._factor[rung]

    def note(self, rung: int, value: float, weight: float) -> None:
        """`value` was measured; `weight`, up to 1, is how much of the past it replaces.

        On a rung that is new the surprise is the rung's, on one that is known the data's.
        """
        factor, seen = self._factor[rung], self._seen[rung]
        share = 0.0
        if self._base * self._typical[rung] > _NOTHING:
            share = max(weight / (seen + weight), _DRIFT * weight)
            moved = factor + share * (value / self._base - factor)
            typical = self._typical[rung]
            self._factor[rung] = min(max(moved, typical / _SPAN), typical * _SPAN)
            self._seen[rung] = seen + weight
        self._base += weight * (1 - share) * (value / factor - self._base)
