"""Threads that compress and send over a link, on a clock of their own.

Nothing is compressed, all is reckoned: what is chosen for a link is the same on every machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from blktrack.ship.wire.pace import Level
from blktrack.units import MIB

BATCH = 4 * MIB
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
    kind: str = ""
    state: str = "idle"  # read, compress, queue, send
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

    rate: Callable[[float], float]  # bytes per second at a time
    buffer: float = 2.0 * MIB  # bytes that are taken at once
    cipher: float = 0.0  # processor seconds per byte sent, as ssh needs them
    processors: int = 2
    others: int = 0  # threads that always run
    now: float = 0.0
    filled: float = 0.0


@dataclass
class Outcome:
    seconds: float
    chosen: list[int | None] = field(default_factory=list)


def ship(level: Level, link: Link, batches: Iterable[tuple[str, int]], threads: int = 4) -> Outcome:
    """Send (kind of data, bytes) in order; the seconds until the last byte has left the buffer."""
    work = deque(batches)
    crew = [_Thread() for _ in range(threads)]
    queue: deque[_Thread] = deque()
    chosen: list[int | None] = []

    def begin(thread: _Thread) -> None:
        if not work:
            thread.state = "idle"
            return
        thread.kind, thread.raw = work.popleft()
        thread.state, thread.left = "read", thread.raw * READING

    def compress(thread: _Thread) -> None:
        thread.level = level.choose()
        chosen.append(thread.level)
        part, speed = (1.0, 0.0) if thread.level is None else COSTS[thread.kind][thread.level]
        thread.stored = thread.raw * (part if part < 15 / 16 else 1.0)
        thread.state, thread.since = "compress", link.now
        thread.left = thread.cpu_s = thread.raw / speed if speed else 0.0

    for thread in crew:
        begin(thread)
    while True:
        # What can go on at once does.
        moved = True
        while moved:
            moved = False
            for thread in crew:
                if thread.state == "read" and thread.left <= 1e-12:
                    compress(thread)
                if thread.state == "compress" and thread.left <= 1e-12:
                    thread.compress_s = 0.0 if thread.level is None else link.now - thread.since
                    thread.state, thread.left = "queue", thread.stored
                    queue.append(thread)
                    moved = True
            if queue and queue[0].state == "queue":
                queue[0].state, queue[0].since = "send", link.now
            if queue and (room := min(link.buffer - link.filled, queue[0].left)) > 1e-6:
                queue[0].left -= room
                link.filled += room
                moved = True
            if queue and queue[0].left <= 1e-6:
                done = queue.popleft()
                level.note(
                    done.level,
                    done.raw,
                    round(done.stored),
                    compress_s=done.compress_s,
                    cpu_s=done.cpu_s,
                    send_s=link.now - done.since,
                )
                begin(done)
                moved = True
        busy = [thread for thread in crew if thread.state in ("read", "compress")]
        sending = link.filled > 1e-6
        if not busy and not sending:
            return Outcome(link.now, chosen)
        ssh = 1 if sending and link.cipher else 0
        share = min(1.0, link.processors / max(1, len(busy) + ssh + link.others))
        drain = link.rate(link.now)
        if ssh:
            drain = min(drain, share / link.cipher)
        steps = [thread.left / share for thread in busy]
        if sending:
            steps.append(min(link.filled, queue[0].left if queue else link.filled) / drain)
        step = max(min(steps), 1e-9)
        step = min(step, 0.05)  # the rate may change
        for thread in busy:
            thread.left -= step * share
        if sending:
            link.filled = max(0.0, link.filled - step * drain)
        link.now += step
