"""How fast a copy may read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST = 0.25  # seconds' worth that may be caught up after a pause


class RateLimit:
    """A token bucket shared by threads: `rate` bytes a second on the monotonic clock."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        if rate <= 0:
            raise ValueError("a rate must be positive")
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()  # when what was taken so far is paid for

    def take(self, count: int) -> float:
        """Take `count` bytes; the seconds to wait before they may be read."""
        with self._lock:
            now = self._clock()
            start = max(self._free_at, now - BURST)
            self._free_at = start + count / self._rate
            return max(0.0, start - now)
