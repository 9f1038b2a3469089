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
_RUNG_OF = {rung.level: at for at, rung in enumerate(_RUNGS)}
_START = _RUNG_OF[1]

_GAIN, _COST = math.log(3), 4e-9  # of level 1, before anything was measured
_LINK = 50e6  # bytes per second: likewise; a rate that no choice is very wrong for
_MEMORY = 2 * MIB  # so much of the latest data counts most
_LINK_MOST = 1.25e9  # more than ssh can do
_FULL = 0.7  # part of the time that is spent sending
_BUFFER = 2 * MIB  # of what is sent, while which a rate that was never measured grows e times
_UNKNOWN = 4 * MIB  # that were sent at first, and say too little of the link
_SEARCH = 64 * MIB  # of data, while which one that was does
_MANY = 50.0  # of these: math.exp() has an end
_FAR = 1.5  # times as much or as little as was expected is a great surprise
_SPAN = 3.0  # how far from what is typical a level may be, either way
_SHARP = 5.0  # the slower counts; where they are near, that each waits for the other at times too
_STAY = 0.03  # what is better by less is not worth a change
_PROBE = 8  # choices after which a neighbour is looked at
_RARELY = 64  # and where that never pays
_NEAR = 1.25  # a neighbour that looks worse than so is looked at rarely from the beginning
_THREADS = 4  # that compress and send
_ALONE = 1.1  # threads that go on so much more slowly than alone are alone
_NOTES = 12  # batches over which the course of the whole is averaged
_NOTHING = 1e-12  # instead of a division by zero


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
        """processors -- that there are for this process, if not those that the kernel says.

        ValueError for a level that is none.
        """
        if isinstance(setting, int) and not 1 <= setting <= FIXED_MOST:
            raise ValueError(f"{setting} is not a level from 1 to {FIXED_MOST}")
        self._setting = setting
        self._lock = threading.Lock()
        self._link = _Link()
        self._course = _Course(clock, processors or len(os.sched_getaffinity(0)))
        self._gain = _Profile(_GAIN, 0.1, [rung.gain for rung in _RUNGS])
        self._cost = _Profile(_COST, 0.0, [rung.cost for rung in _RUNGS])
        self._now = _START
        self._wait = self._patience = _PROBE
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
        self,
        level: int | None,
        raw: int,
        stored: int,
        *,
        compress_s: float,
        cpu_s: float,
        send_s: float,
    ) -> None:
        """What became of a batch: its bytes, those that were sent, and seconds.

        stored -- `raw` if it was sent as it is, also where compressing it was in vain.
        compress_s, cpu_s -- compressing, by the clock and of a processor: time.thread_time().
        send_s -- by the clock, with waits for a limit, without those for other senders.
        """
        if self._setting != "adapt" or raw <= 0:
            return
        rung = _RUNG_OF[level]
        with self._lock:
            weight = 1 - math.exp(-raw / _MEMORY)
            self._course.end(compress_s, cpu_s, stored, send_s)
            self._link.note(raw, stored, self._course.rate, full=self._course.sending > _FULL)
            if level is not None:
                self._cost.note(rung, cpu_s / raw, weight)
                self._gain.note(rung, math.log(raw / max(1, min(stored, raw))), weight)
            self._settle()

    def _settle(self) -> None:
        times = [self._time(rung) for rung in range(len(_RUNGS))]
        # What is sent first goes into buffers, however slow the link: it may need every level.
        least = 0 if self._link.sent > _UNKNOWN else _START
        best = min(range(least, len(_RUNGS)), key=times.__getitem__)
        if times[best] < times[self._now] * (1 - _STAY):
            # One by one: the further away, the less is known.
            self._now += 1 if best > self._now else -1
            self._wait = self._patience = _PROBE

    def _time(self, rung: int) -> float:
        """Seconds per byte that the whole would take at a level."""
        compressing = self._cost.at(rung) / self._course.processors
        sending = math.exp(-self._gain.at(rung)) / self._link.rate
        return math.pow(compressing**_SHARP + sending**_SHARP, 1 / _SHARP)

    def _neighbour(self) -> int:
        """The rung above or below, in turns, to see whether it is still as it was."""
        self._up = not self._up or self._now == 0
        rung = min(max(self._now + (1 if self._up else -1), 0), len(_RUNGS) - 1)
        near = self._time(rung) < _NEAR * self._time(self._now)
        self._patience = min(_RARELY, self._patience * (1 if near and self._now else 2))
        self._wait = self._patience
        # Without a look nothing is learned of the data; else one that costs much is rare.
        return rung if near or self._now == 0 or self._patience == _RARELY else self._now


class _Link:
    """Bytes per second, as the senders see it.

    Pipes, ssh and TCP take a few MiB at once, which looks like a fast link. Senders that wait most
    of the time have measured it; others may raise the rate from there on, slowly.
    """

    def __init__(self) -> None:
        self.rate = self._measured = _LINK
        self.sent = 0
        self._known = False
        self._searched = 0.0  # since the last measurement, in units of the growth

    def note(self, raw: int, sent: int, seen: float, *, full: bool) -> None:
        """`seen` is the rate at which bytes went while they were sent."""
        seen = max(seen, 1.0)
        self.sent += sent
        if full:
            self._known = True
            self._searched = 0.0
            self._measured = self.rate = seen
            return
        self._searched += raw / _SEARCH if self._known else sent / _BUFFER
        most = self._measured * math.exp(min(self._searched, _MANY))
        self.rate = min(seen, most, _LINK_MOST)


class _Course:
    """What the threads did lately, while any was at work: a pause between is nobody's slowness."""

    def __init__(self, clock: Callable[[], float], processors: int) -> None:
        self._clock = clock
        self._processors = processors
        self._last = 0.0
        self._inside = 0  # threads between choose() and note()
        self._passed = self._compressing = self._cpu = self._sent = self._sending = 0.0

    def begin(self) -> None:
        if self._inside in (0, _THREADS):  # so many: those before have ended without a word
            self._inside, self._last = 0, self._clock()
        self._inside += 1

    def end(self, compress_s: float, cpu_s: float, sent: int, send_s: float) -> None:
        now, keep = self._clock(), 1 - 1 / _NOTES
        self._passed = self._passed * keep + now - self._last
        self._compressing = self._compressing * keep + compress_s
        self._cpu = self._cpu * keep + cpu_s
        self._sent = self._sent * keep + sent
        self._sending = self._sending * keep + send_s
        self._inside = max(0, self._inside - 1)
        self._last = now

    @property
    def sending(self) -> float:
        """The part of the time in which one of them was sending."""
        return self._sending / max(self._passed, _NOTHING)

    @property
    def rate(self) -> float:
        """Bytes per second while one of them was sending."""
        return self._sent / max(self._sending, _NOTHING)

    @property
    def processors(self) -> float:
        """How many there are for _THREADS that compress, next to what else runs here.

        Threads that are more than the processors share them evenly: from how slowly ours went on,
        and how many they were, follows how many others there are.
        """
        slower = max(1.0, self._compressing / max(self._cpu, _NOTHING))
        ours = self._compressing / max(self._passed, _NOTHING)
        others = max(0.0, slower * self._processors - ours)
        if slower < _ALONE:
            others = 0.0
        return min(_THREADS, self._processors, _THREADS * self._processors / (_THREADS + others))


class _Profile:
    """A quantity that depends on the data, as one number, and on the rung, as a factor."""

    def __init__(self, base: float, least: float, typical: list[float]) -> None:
        """Below `least` it says nothing of the rungs."""
        self._base = base
        self._least = least
        self._typical = typical
        self._factor = list(typical)
        self._seen = [0.0] * len(typical)
        self._seen[_START] = math.inf  # the others are next to it

    def at(self, rung: int) -> float:
        return self._base * self._factor[rung]

    def note(self, rung: int, value: float, weight: float) -> None:
        """`value` was measured; `weight`, up to 1, is how much of the past it replaces.

        A great surprise is the data's, a small one that of a rung that is new, and on one that is
        known mostly the data's again.
        """
        factor, seen = self._factor[rung], self._seen[rung]
        share = 0.0
        expected = self._base * factor
        far = not expected / _FAR < value < expected * _FAR
        if self._base > self._least and not far:
            share = weight / (seen + weight)
            moved = factor + share * (value / self._base - factor)
            typical = self._typical[rung]
            self._factor[rung] = min(max(moved, typical / _SPAN), typical * _SPAN)
            self._seen[rung] = seen + weight
        self._base += weight * (1 - share) * (value / factor - self._base)
