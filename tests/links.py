"""Threads that compress and send over a link, on a clock of their own.

Nothing is compressed, all is reckoned: what is chosen for a link is the same on every machine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from blktrack.ship.wire.pace import Level
from blktrack.units import MIB

BATCH = 4 * MIB
_LITTLE = 1e-6  # of a byte: floats are not exact
MBIT = 1e6 / 8
READING = 0.4e-9  # processor seconds per byte: reading, looking for zeroes, checksums

# (stored part, bytes compressed per second of a processor) by level, measured with zstd 1.5.7.
Costs = dict[int, tuple[float, float]]


def _costs(text: str) -> Costs:
    found = {}
    for row in text.split(";"):
        level, part, speed = row.split()
        found[int(level)] = (float(part), float(speed) * MIB)
    return found


COSTS: dict[str, Costs] = {
    "random": _costs(
        "-50 1 2794; -10 1 3434; -1 1 2694; 1 1 2605; 2 1 2155; 3 1 2045; 5 1 1853; 6 1 1812;"
        "7 1 1286; 9 1 1019; 10 1 703; 12 1 456; 15 1 36"
    ),
    "text": _costs(
        "-50 .6593 363; -10 .3888 235; -1 .3063 202; 1 .2676 200; 2 .2638 178; 3 .2468 185;"
        "5 .2428 65; 6 .2336 54; 7 .2295 46; 9 .2278 36; 10 .2242 22; 12 .2209 13.5; 15 .2023 2.3"
    ),
    "pages": _costs(
        "-50 .5668 794; -10 .4762 536; -1 .3385 335; 1 .2992 278; 2 .2992 226; 3 .2996 145;"
        "5 .2903 83; 6 .2761 76; 7 .2734 50; 9 .2707 43; 10 .2674 35; 12 .2652 20; 15 .2588 8.2"
    ),
    "sparse": _costs(
        "-50 .0390 3790; -10 .0316 2791; -1 .0229 2264; 1 .0206 1539; 2 .0206 1753; 3 .0207 1968;"
        "5 .0203 703; 6 .0194 506; 7 .0193 435; 9 .0191 544; 10 .0191 413; 12 .0190 228;"
        "15 .0189 192"
    ),
}
LEVELS: list[int | None] = [None, *COSTS["text"]]


@dataclass
class _Thread:
    state: str = "idle"  # read, compress, queue, send
    kind: str = ""  # of its batch
    level: int | None = None
    raw: int = 0
    stored: float = 0.0
    left: float = 0.0  # processor seconds, or bytes
    since: float = 0.0
    compress_s: float = 0.0
    cpu_s: float = 0.0


@dataclass
class Link:
    """What is between the two hosts, and the processors of the near one."""

    rates: list[tuple[float, float]]  # (from when on, bytes per second)
    buffer: float = 2.0 * MIB  # bytes that are taken at once
    cipher: float = 2.5e-9  # processor seconds per byte sent, as ssh needs them
    processors: int = 2
    others: int = 0  # threads that always run
    now: float = 0.0
    filled: float = 0.0

    @classmethod
    def of(cls, mbit: float, **given: float) -> Link:
        return cls([(0.0, mbit * MBIT)], **given)  # type: ignore[arg-type]

    @property
    def rate(self) -> float:
        return next(rate for begin, rate in reversed(self.rates) if begin <= self.now)

    @property
    def until(self) -> float:
        """Seconds until the rate is another."""
        return next((begin - self.now for begin, _ in self.rates if begin > self.now), math.inf)


class Chooser(Protocol):
    def choose(self) -> int | None: ...
    def note(
        self,
        level: int | None,
        raw: int,
        stored: int,
        *,
        compress_s: float,
        cpu_s: float,
        send_s: float,
    ) -> None: ...


class Always:
    """One level, also of those that Level does not take."""

    def __init__(self, level: int | None) -> None:
        self._level = level

    def choose(self) -> int | None:
        return self._level

    def note(self, *_: object, **__: object) -> None: ...


class Shipment:
    """(Kind of data, bytes) sent in order; `seconds` until the last byte has left the buffer."""

    def __init__(self, level: Chooser, link: Link, batches: Iterable[tuple[str, int]]) -> None:
        self.times: list[float] = []  # of the choices
        self.chosen: list[int | None] = []
        self._level = level
        self._link = link
        self._work = deque(batches)
        self._crew = [_Thread() for _ in range(4)]
        self._queue: deque[_Thread] = deque()  # the first one sends
        begun = link.now
        for thread in self._crew:
            self._begin(thread)
        while self._step():
            pass
        self.seconds = link.now - begun

    def _begin(self, thread: _Thread) -> None:
        thread.state = "idle"
        if self._work:
            thread.kind, thread.raw = self._work.popleft()
            thread.state, thread.left = "read", thread.raw * READING

    def _compress(self, thread: _Thread) -> None:
        thread.level = self._level.choose()
        self.chosen.append(thread.level)
        self.times.append(self._link.now)
        part, speed = 1.0, math.inf
        if thread.level is not None:
            part, speed = COSTS[thread.kind][thread.level]
        thread.stored = thread.raw * part
        thread.state, thread.since = "compress", self._link.now
        thread.left = thread.cpu_s = thread.raw / speed

    def _enqueue(self, thread: _Thread) -> None:
        thread.compress_s = 0.0 if thread.level is None else self._link.now - thread.since
        thread.state, thread.left = "queue", thread.stored
        self._queue.append(thread)

    def _send(self) -> bool:
        """Fill the buffer; whether the first in the queue has got rid of all."""
        first, link = self._queue[0], self._link
        if first.state == "queue":
            first.state, first.since = "send", link.now
        room = min(link.buffer - link.filled, first.left)
        first.left -= room
        link.filled += room
        if first.left > _LITTLE:
            return False
        self._queue.popleft()
        self._level.note(
            first.level,
            first.raw,
            round(first.stored),
            compress_s=first.compress_s,
            cpu_s=first.cpu_s,
            send_s=link.now - first.since,
        )
        self._begin(first)
        return True

    def _step(self) -> bool:
        """To the next event; False at the end."""
        link = self._link
        for thread in self._crew:
            if thread.state == "read" and thread.left <= 1e-12:
                self._compress(thread)
            if thread.state == "compress" and thread.left <= 1e-12:
                self._enqueue(thread)
        while self._queue and self._send():
            pass
        busy = [thread for thread in self._crew if thread.state in ("read", "compress")]
        sending = link.filled > _LITTLE
        if not busy and not sending:
            return False
        running = len(busy) + link.others + bool(sending and link.cipher)
        share = min(1.0, link.processors / max(1, running))
        rate = min(link.rate, share / link.cipher) if link.cipher else link.rate
        steps = [thread.left / share for thread in busy] + [link.until]
        if sending:
            most = self._queue[0].left if self._queue else link.filled
            steps.append(min(link.filled, most) / rate)
        step = max(min(steps), 1e-9)
        for thread in busy:
            thread.left -= step * share
        if sending:
            link.filled = max(0.0, link.filled - step * rate)
        link.now += step
        return True


def best_fixed(
    link: Callable[[], Link], batches: list[tuple[str, int]]
) -> tuple[float, int | None]:
    """The seconds that the best of all levels takes, and which it is."""
    return min(
        ((Shipment(Always(level), link(), batches).seconds, level) for level in LEVELS),
        key=lambda found: found[0],
    )


def adaptive(link: Link) -> Level:
    return Level(processors=link.processors, clock=lambda: link.now)
