"""Progress on standard error: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

from blktrack.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SHOW_AFTER = 1.0  # seconds: what is over sooner shows nothing
_LINE_EVERY = 10.0


class Watcher:
    """An Observer. With `quiet` it shows nothing but warnings."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._total = "", 0
        self._begun = self._last = time.monotonic()

    def phase(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._begun = self._last = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=total or None, description=name)

    def done(self, count: int) -> None:
        now = time.monotonic()
        # A later round reads again what changed, which no phase had counted. 0: nobody knows.
        self._total = self._total and max(self._total, count)
        if self._quiet or now - self._begun < _SHOW_AFTER:
            return
        if self._terminal and self._can_draw():
            self._show_bar(count)
        elif now - self._last >= _LINE_EVERY:
            self._last = now
            print(self._line(count, now - self._begun), file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        self.close()
        with contextlib.suppress(OSError):
            print(f"blktrack: warning: {message}", file=sys.stderr, flush=True)

    def _line(self, count: int, elapsed: float) -> str:
        if not self._total:
            return f"{self._name}: {format_size(count)}, {format_rate(count, elapsed)}"
        left = (self._total - count) * elapsed / count if count else 0.0
        return (
            f"{self._name}: {format_size(count)} of {format_size(self._total)}, "
            f"{format_rate(count, elapsed)}, {format_duration(left)} to go"
        )

    def _can_draw(self) -> bool:
        """A host that only receives may have no rich."""
        return self._bar is not None or find_spec("rich") is not None

    def _show_bar(self, count: int) -> None:
        if self._bar is None:
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

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total or None)
        if self._task is not None:
            self._bar.update(self._task, completed=count, total=self._total or None)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
