"""How many bytes per second, at which time of the week."""

from __future__ import annotations

import time
from dataclasses import dataclass

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class Window:
    """A time of the day on some days, local time, with a rate of its own."""

    days: frozenset[int]  # 0 is Monday; those on which it begins
    begin: int  # minutes since midnight
    end: int  # the first minute after it; before `begin`: on the next day
    limit: int | None  # bytes per second, None for no limit

    def holds(self, day: int, minute: int) -> bool:
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        began_today = day in self.days and minute >= self.begin
        return began_today or ((day - 1) % 7 in self.days and minute < self.end)


@dataclass(frozen=True)
class Rates:
    """A rate, and the windows in which it is another: the first that holds counts."""

    limit: int | None = None  # bytes per second, None for no limit
    windows: tuple[Window, ...] = ()

    def at(self, when: float) -> int | None:
        """The limit at `when`, in seconds since the epoch."""
        if not self.windows:
            return self.limit
        local = time.localtime(when)
        minute = local.tm_hour * 60 + local.tm_min
        return next(
            (window.limit for window in self.windows if window.holds(local.tm_wday, minute)),
            self.limit,
        )

    @property
    def least(self) -> int | None:
        """The lowest of its limits; None if it never has one."""
        limits = [window.limit for window in self.windows] + [self.limit]
        return min((limit for limit in limits if limit is not None), default=None)


UNLIMITED = Rates()
