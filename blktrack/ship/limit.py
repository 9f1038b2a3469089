"""How fast a copy may read, and how fast a sender may send."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from blktrack.rates import Rates

BURST = 0.25  # seconds' worth that may be caught up after a pause


class RateLimit:
    """A token bucket shared by threads, on the monotonic clock; its rate is looked up each time, so
    that a copy follows the windows that it runs through."""

    def __init__(
        self,
        rates: Rates,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        if rates.least is not None and rates.least <= 0:
            raise ValueError("a rate must be positive")
        self._rates = rates
        self._clock, self._now = clock, now
        self._lock = threading.Lock()
        self._free_at = clock()  # when what was taken so far is paid for

    def take(self, count: int) -> float:
        """Take `count` bytes; the seconds to wait before they may be read."""
        rate = self._rates.at(self._now())
        with self._lock:
            now = self._clock()
            if rate is None:
                self._free_at = now
                return 0.0
            start = max(self._free_at, now - BURST)
            self._free_at = start + count / rate
            return max(0.0, start - now)

    @property
    def rate(self) -> int | None:
        """Bytes per second at this moment."""
        return self._rates.at(self._now())


_SLICES = 16  # per second
_SLICE_MOST = 256 << 10  # bytes


class Throttle:
    """Holds senders to a rate, slice by slice.

    What is sent at a time is not larger than `slice`: then in any time no more leaves than the rate
    allows for it, a third of a second's worth aside.
    """

    def __init__(
        self,
        rates: Rates,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._limit = RateLimit(rates, clock, now)
        self._clock = clock

    @property
    def slice(self) -> int:
        """How many bytes to send at a time, at this moment."""
        rate = self._limit.rate
        return _SLICE_MOST if rate is None else min(max(1, rate // _SLICES), _SLICE_MOST)

    def wait(self, count: int, stop: threading.Event) -> bool:
        """Wait until the next `count` bytes may be sent; False if `stop` was set before."""
        until = self._clock() + self._limit.take(count)
        while (left := until - self._clock()) > 0:
            if stop.wait(left):
                return False
        return not stop.is_set()
