"""Progress of several syncs at once on standard error: a row for each on a terminal, in a log now
and then a line for each. No thread draws: whoever forks must have none."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from blktrack.report import LinkOutcome
from blktrack.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SHOW_AFTER = 1.0  # seconds: what is over sooner shows nothing
_LINE_EVERY = 10.0


@dataclass
class Row:
    """One link in one phase."""

    phase: str
    total: int
    count: int = 0
    begun: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    task: TaskID | None = None

    def line(self, now: float) -> str:
        elapsed = now - self.begun
        left = (self.total - self.count) * elapsed / self.count if self.count else 0.0
        return (
            f"{self.phase}: {format_size(self.count)} of {format_size(self.total)}, "
            f"{format_rate(self.count, elapsed)}, {format_duration(left)} to go"
        )


class Rows:
    """A FleetWatcher. With `quiet` it shows nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._draws = not quiet and sys.stderr.isatty() and find_spec("rich") is not None
        self._rows: dict[str, Row] = {}
        self._progress: Progress | None = None

    def phase(self, link: str, name: str, total: int) -> None:
        row = self._rows.get(link)
        self._rows[link] = Row(name, total, task=row.task if row else None)
        if self._progress is not None and row is not None and row.task is not None:
            self._progress.reset(row.task, total=total or None, description=f"{link} {name}")

    def done(self, link: str, count: int) -> None:
        row = self._rows[link]
        # A later round reads again what changed, which no phase had counted.
        row.count, row.total = count, max(row.total, count)

    def warn(self, link: str, message: str) -> None:
        if not self._quiet:
            _say(f"blktrack: warning: {link}: {message}")

    def ended(self, found: LinkOutcome) -> None:
        row = self._rows.pop(found.name, None)
        if row is not None and row.task is not None and self._progress is not None:
            self._progress.remove_task(row.task)

    def tick(self) -> None:
        if self._quiet:
            return
        now = time.monotonic()
        shown = {name: row for name, row in self._rows.items() if now - row.begun >= _SHOW_AFTER}
        if self._draws:
            self._draw(shown)
            return
        for name, row in shown.items():
            if row.count and now - row.told >= _LINE_EVERY:
                row.told = now
                _say(f"{name}: {row.line(now)}")

    def _draw(self, shown: dict[str, Row]) -> None:
        if self._progress is None:
            if not shown:
                return
            self._progress = _bars()
            self._progress.start()
        for name, row in shown.items():
            if row.task is None:
                row.task = self._progress.add_task(f"{name} {row.phase}", total=row.total or None)
            self._progress.update(row.task, completed=row.count, total=row.total or None)
        self._progress.refresh()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def _bars() -> Progress:
    # rich takes a tenth of a second to load: only for who waits anyway.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
