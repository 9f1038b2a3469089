"""Progress of several syncs at once, a row for each; without threads, as whoever forks needs it."""

from __future__ import annotations

from typing import Self

from blktrack.cli.meter import Meter
from blktrack.cli.progress import Screen
from blktrack.report import LinkOutcome


class Rows:
    """A FleetWatcher. With `quiet` it shows nothing: what is to be known is in the outcomes."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._meters: dict[str, Meter] = {}
        self._screen = Screen([], quiet=quiet)

    def phase(self, link: str, name: str, total: int) -> None:
        if link not in self._meters:
            self._meters[link] = Meter(link)
            self._screen.add(self._meters[link])
        self._meters[link].phase(name, total)

    def done(self, link: str, count: int) -> None:
        self._meters[link].done(count)

    def warn(self, link: str, message: str) -> None:
        if not self._quiet:
            self._screen.warn(f"{link}: {message}")

    def ended(self, found: LinkOutcome) -> None:
        if meter := self._meters.pop(found.name, None):
            self._screen.drop(meter)

    def tick(self) -> None:
        self._screen.tick()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.close()
