"""Progress on standard error: bars on a terminal, now and then a line in a log.

A thread of its own shows it, so that what waits for a lock, a disk or a hook is seen to wait, and a
log that cannot be written holds up no copy. While something is frozen it writes nothing.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from blktrack.cli.meter import Meter, Reading
from blktrack.observer import ASKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SHOW_AFTER = 1.0  # seconds: on a terminal, what is over sooner shows nothing
_LINE_EVERY = 10.0  # in a log
_TELL_AFTER = 2.0  # once there are lines, a phase that lasts so long has one
_REDRAW, _LOOK = 0.2, 0.5  # seconds between two looks


class Screen:
    """Shows meters, and prints their warnings. `quiet`: nothing but warnings.

    `tick` is what its thread does; without `start` the caller does.
    """

    def __init__(
        self, meters: Sequence[Meter], *, quiet: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.gate = threading.Lock()
        self._meters: list[Meter] = []
        self._warnings: list[str] = []
        for meter in meters:
            self.add(meter)
        self._quiet = quiet
        self._clock = clock
        self._begun = clock()
        self._bars = sys.stderr.isatty() and find_spec("rich") is not None
        self._progress: Progress | None = None
        self._tasks: dict[Meter, TaskID] = {}
        self._told: dict[Meter, tuple[str, float]] = {}  # phase and time of its last line
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, meter: Meter) -> None:
        """From now on."""
        meter.gate = self.gate
        self._meters.append(meter)

    def drop(self, meter: Meter) -> None:
        """What it measured has ended."""
        self._meters.remove(meter)
        self._told.pop(meter, None)
        task = self._tasks.pop(meter, None)
        if task is not None and self._progress is not None:
            self._progress.remove_task(task)

    def warn(self, message: str) -> None:
        """Print it as soon as anything may be written."""
        self._warnings.append(message)

    def start(self) -> None:
        if not self._quiet:
            # A daemon: a log that is stuck must not keep the process.
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        # Nobody is there to read it any more.
        with contextlib.suppress(OSError):
            while not self._ended.wait(_REDRAW if self._bars else _LOOK):
                self.tick()

    def tick(self) -> None:
        """Show what is due."""
        with self.gate:
            readings = {meter: meter.reading() for meter in self._meters}
            if any(reading.hushed for reading in readings.values()):
                return
            self._print_warnings()
            begun = {meter: reading for meter, reading in readings.items() if reading.phase}
            if self._quiet or not begun:
                return
            if not self._bars:
                for meter, reading in begun.items():
                    self._tell(meter, reading)
            elif self._clock() - self._begun >= _SHOW_AFTER:
                self._draw(begun)

    def _tell(self, meter: Meter, reading: Reading) -> None:
        now = self._clock()
        phase, last = self._told.get(meter, ("", meter.born))
        new = phase not in ("", reading.phase) and reading.elapsed >= _TELL_AFTER
        if new or now - last >= _LINE_EVERY:
            self._told[meter] = reading.phase, now
            label = f"{meter.label}: " if meter.label else ""
            print(f"{label}{reading.phase}: {reading.figures}", file=sys.stderr, flush=True)

    def _draw(self, readings: dict[Meter, Reading]) -> None:
        if self._progress is None:
            # rich takes a tenth of a second to load: only for who waits anyway.
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            phase = Column(ratio=2, no_wrap=True, overflow="ellipsis")
            self._progress = Progress(
                TextColumn("{task.description}", table_column=phase, markup=False),
                BarColumn(None, table_column=Column(ratio=1, min_width=6)),
                TextColumn(
                    "{task.fields[figures]}", table_column=Column(no_wrap=True), markup=False
                ),
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,
                expand=True,
            )
        for meter, reading in readings.items():
            if meter not in self._tasks:
                self._tasks[meter] = self._progress.add_task("", total=None, figures="")
            name = f"{meter.label} {reading.phase}".strip()
            self._progress.update(
                self._tasks[meter],
                description=name,
                completed=reading.count,
                total=reading.total or None,
                figures=reading.figures,
            )
        self._progress.start()  # the first time
        self._progress.refresh()

    def _print_warnings(self) -> None:
        """To be called with the gate held."""
        for warnings in (self._warnings, *(meter.warnings for meter in self._meters)):
            while warnings:
                self._clear()
                message = warnings.pop(0)
                with contextlib.suppress(OSError):
                    print(f"blktrack: warning: {message}", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        progress, self._progress, self._tasks = self._progress, None, {}
        if progress is not None:
            with contextlib.suppress(OSError):
                progress.stop()

    def clear(self) -> None:
        """Take bars away, until it is time to draw them again."""
        with self.gate:
            self._clear()

    def close(self) -> None:
        """Take bars away and print the warnings that are left."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with self.gate:
            self._clear()
            self._print_warnings()


class Watcher(Meter):
    """The Observer of a command that does one thing, with a screen of its own."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self.screen = Screen([self], quiet=quiet)

    def phase(self, name: str, total: int) -> None:
        super().phase(name, total)
        if name == ASKING:  # below a bar nobody would find the question
            self.screen.clear()

    def __enter__(self) -> Self:
        self.screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.screen.close()
