"""Senders held to a rate: on a clock of its own, and as threads."""

from __future__ import annotations

import random
import threading
import time

import pytest

from blktrack.rates import DAYS, UNLIMITED, Rates, Window
from blktrack.ship.limit import Throttle
from blktrack.units import KIB, MIB

SECONDS = 20


class Clock(threading.Event):
    """Time that passes by waiting for it, a little more of it each time than was asked for."""

    def __init__(self, late: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.now = 1000.0
        self._late = late
        self._rng = random.Random(seed)

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if not self.is_set():
            self.now += timeout + self._rng.random() * self._late
        return self.is_set()


def send(throttle: Throttle, clock: Clock, count: int, sent: list[tuple[float, int]]) -> None:
    """As a sender does: a message in slices."""
    while count:
        size = min(count, throttle.slice)
        assert throttle.wait(size, clock)
        sent.append((clock.now, size))
        count -= size


@pytest.mark.parametrize("late", [0.0, 0.05], ids=["in time", "late"])
@pytest.mark.parametrize("rate", [10, 100 * KIB, 3 * MIB, 100 * MIB])
def test_the_rate_is_kept(rate: int, late: float, seed: int) -> None:
    """Over 20 seconds within 5 %, and in no time more than a second's worth beyond the rate."""
    clock = Clock(late, seed)
    throttle = Throttle(Rates(rate), clock=lambda: clock.now)
    rng = random.Random(seed)
    sent: list[tuple[float, int]] = []
    clock.now += 1000.0  # nothing was sent meanwhile: little of it is caught up
    begun = clock.now
    while clock.now < begun + SECONDS:
        send(throttle, clock, min(rng.choice([1, 4 * KIB, MIB, 4 * MIB]), 30 * rate), sent)
    total = sum(size for at, size in sent if at < begun + SECONDS)
    assert total == pytest.approx(rate * SECONDS, rel=0.05)
    done = [0]
    for _, size in sent:
        done.append(done[-1] + size)
    # Beyond the rate since the time at which that was least: that of any time in between.
    least = 0.0
    for number, (at, _) in enumerate(sent):
        least = min(least, done[number] - rate * (at - begun))
        assert done[number + 1] - rate * (at - begun) - least <= rate / 2


def test_slices() -> None:
    """Small enough to be many in a second, and no smaller than they have to be."""
    for rate, size in ((1, 1), (100 * KIB, 6400), (10 << 30, 256 * KIB)):
        assert Throttle(Rates(rate)).slice == size
    assert Throttle(UNLIMITED).slice == 256 * KIB


def test_the_time_of_the_day_counts() -> None:
    night = Window(frozenset(range(len(DAYS))), 22 * 60, 6 * 60, None)
    clock, day = Clock(), time.mktime((2026, 3, 2, 21, 59, 0, 0, 0, -1))
    throttle = Throttle(
        Rates(MIB, (night,)), clock=lambda: clock.now, now=lambda: day + clock.now - 1000
    )
    sent: list[tuple[float, int]] = []
    send(throttle, clock, 60 * MIB, sent)
    assert clock.now == pytest.approx(1060, abs=0.5)
    assert throttle.slice == 64 * KIB
    clock.now = 1060.5
    assert throttle.slice == 256 * KIB
    send(throttle, clock, 1000 * MIB, sent)
    assert clock.now == 1060.5


def test_stopping_does_not_wait() -> None:
    stop = threading.Event()
    throttle = Throttle(Rates(1))
    assert throttle.wait(1000, stop)
    answers: list[bool] = []
    waiting = [
        threading.Thread(target=lambda: answers.append(throttle.wait(1000, stop)), daemon=True)
        for _ in range(4)
    ]
    for thread in waiting:
        thread.start()
    stop.set()
    for thread in waiting:
        thread.join(timeout=60)
    assert answers == [False] * 4
    assert not Throttle(UNLIMITED).wait(1, stop)


def test_threads_share_the_rate() -> None:
    """Slow machines only make it longer."""
    stop, throttle = threading.Event(), Throttle(Rates(MIB))
    lock, failed = threading.Lock(), []
    left = MIB

    def run() -> None:
        nonlocal left
        while True:
            with lock:
                if left <= 0:
                    return
                left -= throttle.slice
            if not throttle.wait(throttle.slice, stop):
                failed.append(threading.current_thread())

    begun = time.monotonic()
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun > 0.6
    assert failed == []
