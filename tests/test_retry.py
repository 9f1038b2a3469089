"""How long and how often a lost connection is tried again, by a clock that the test turns."""

from __future__ import annotations

import threading

import pytest

from blktrack.ship.retry import FIRST, MOST, Retry


class Clock:
    """Time that passes while somebody waits, and only then: an Event and a Watch on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.news: list[float] = []  # when something happens on the network
        self.stop = _Stop(self)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, timeout: float, stop: threading.Event) -> bool:
        if self.news and self.news[0] <= self.now + timeout:
            self.sleep(max(0.0, self.news.pop(0) - self.now))
            return True
        self.sleep(timeout)
        return False

    def retry(self, retry_for: float, *, chance: float = 0.0, watched: bool = True) -> Retry:
        watch = self if watched else None
        return Retry(retry_for, self.stop, watch, clock=self, chance=lambda: chance)

    def waited(self, retry: Retry) -> float:
        """What one wait took; it has to end in another attempt."""
        before = self.now
        assert retry.wait()
        return self.now - before


class _Stop(threading.Event):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.at = float("inf")

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if self._clock.now + timeout >= self.at:
            self._clock.now = max(self._clock.now, self.at)
            self.set()
        else:
            self._clock.sleep(timeout)
        return self.is_set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("watched", [True, False])
def test_waits_double_up_to_the_most(clock: Clock, watched: bool) -> None:
    retry = clock.retry(3600, watched=watched)
    waits = [clock.waited(retry) for _ in range(8)]
    assert waits == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    assert (FIRST, MOST, retry.attempts) == (1, 30, 8)


def test_chance_takes_up_to_a_half(clock: Clock) -> None:
    shortest = clock.retry(3600, chance=1.0)
    waits = [clock.waited(shortest) for _ in range(7)]
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 15, 15])
    retry = Retry(3600, clock.stop, clock, clock=clock)
    for longest in (1, 2, 4, 8, 16, 30, 30):
        assert longest / 2 <= clock.waited(retry) + 1e-6 and retry.left > 0


def test_last_attempt_begins_when_the_time_is_over(clock: Clock) -> None:
    retry = clock.retry(10)
    assert [clock.waited(retry) for _ in range(4)] == pytest.approx([1, 2, 4, 3])
    assert retry.left == pytest.approx(0)
    assert not retry.wait()
    assert clock.now == pytest.approx(1010)


def test_time_of_attempts_counts(clock: Clock) -> None:
    retry = clock.retry(60)
    clock.sleep(59.5)
    assert clock.waited(retry) == pytest.approx(0.5)
    clock.sleep(15)
    assert not retry.wait()


def test_none_at_all(clock: Clock) -> None:
    assert not clock.retry(0).wait()
    assert clock.now == 1000


def test_progress_begins_the_count_anew(clock: Clock) -> None:
    retry = clock.retry(10)
    for _ in range(20):  # 20 connections, each moves something and is lost a little later
        assert clock.waited(retry) == pytest.approx(1)
        clock.sleep(5)
        retry.progress()
        clock.sleep(3)
        assert retry.left == pytest.approx(7)
    assert retry.attempts == 0
    clock.sleep(7)
    assert not retry.wait()


def test_news_end_a_wait_and_the_next_is_short(clock: Clock) -> None:
    retry = clock.retry(3600)
    waits = [clock.waited(retry) for _ in range(5)]
    clock.news = [clock.now + 7]
    waits += [clock.waited(retry) for _ in range(3)]
    assert waits == pytest.approx([1, 2, 4, 8, 16, 7, 1, 2])


def test_news_without_end_are_no_reason_to_call_without_end(clock: Clock) -> None:
    retry = clock.retry(3600)
    clock.news = [0.0] * 1000
    assert [clock.waited(retry) for _ in range(100)] == pytest.approx([0.5] * 100)


@pytest.mark.parametrize("watched", [True, False])
def test_stop_ends_a_wait(clock: Clock, watched: bool) -> None:
    retry = clock.retry(3600, watched=watched)
    clock.stop.at = clock.now + 0.3
    assert not retry.wait()
    assert clock.now == pytest.approx(1000.3)
    assert not retry.wait()
    assert clock.now == pytest.approx(1000.3)


def test_real_time() -> None:
    """The same with the clock of the machine and a stop by another thread."""
    stop = threading.Event()
    retry = Retry(3600, stop)
    for _ in range(3):
        retry.progress()
    retry._delay = MOST
    threading.Timer(0.05, stop.set).start()
    assert not retry.wait()
    assert retry.left > 3600 - MOST / 2
