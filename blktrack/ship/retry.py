"""When to try again after a connection failed, and when to give up.

The waits double from one second to half a minute, each shortened by chance by up to a half, so that
many hosts whose common link is back do not call all at once.

What is bounded is the time in which nothing came across. A connection that moved data has shown
that the link works at times, and a link that breaks every ten minutes should still carry a copy of
hours: that is why each `progress()` begins the count anew. What bounds a whole run is its time
limit, or who stops it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

FIRST, MOST = 1.0, 30.0  # seconds between two attempts, to begin with and at most
_LEAST = 0.5  # seconds that each wait lasts: news of the network may come many times a second


class Watch(Protocol):
    """Who may know before the time that an attempt is worth it."""

    def wait(self, timeout: float, stop: threading.Event) -> bool:
        """Wait up to `timeout` seconds, less if `stop` is set; whether something has happened."""


class Retry:
    """One run's patience with one host.

    retry = Retry(60.0, stop, watch)
    while True:
        try:
            return attempt(retry.progress)
        except ConnectionFailed as error:
            if not (error.retriable and retry.wait()):
                raise
    """

    def __init__(
        self,
        retry_for: float,
        stop: threading.Event,
        watch: Watch | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`retry_for`: seconds without progress, from now on, in which attempts begin; with 0 there
        is but the first."""
        self.attempts = 0  # failed since the last progress
        self._retry_for = retry_for
        self._stop, self._watch = stop, watch
        self._clock, self._chance = clock, chance
        self._since = clock()
        self._delay = FIRST

    def progress(self) -> None:
        """Data came across. From any thread, as often as it does."""
        self._since = self._clock()
        self._delay = FIRST
        self.attempts = 0

    @property
    def left(self) -> float:
        """Seconds until no further attempt begins."""
        return max(0.0, self._since + self._retry_for - self._clock())

    def wait(self) -> bool:
        """Wait for the next attempt; False if there is to be none.

        The last begins when the time is over, not a wait before. News of the network ends a wait,
        and the waits after it begin with the shortest: a path comes back in steps.
        """
        self.attempts += 1
        left = self.left
        if left <= 0:
            return False
        delay = min(self._delay * (1 - self._chance() / 2), left)
        self._delay = min(2 * self._delay, MOST)
        least = min(_LEAST, delay)
        if self._watch is None:
            self._stop.wait(delay)
        elif not self._stop.wait(least) and self._watch.wait(delay - least, self._stop):
            self._delay = FIRST
        return not self._stop.is_set()
