"""The loop of the live display: readings in time, keys, signals."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from blktrack.errors import Interrupted
from blktrack.report import TopReport
from blktrack.tui import board, help
from blktrack.tui.keys import Keys
from blktrack.tui.look import Glyphs
from blktrack.tui.screen import Screen, lost
from blktrack.tui.trend import Trend

INTERVALS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds; + and - go through them
_ESCAPE_ALONE = 0.1  # seconds after which no more of a sequence is expected
_PAGE = 5
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TOLD = 4.0  # seconds for which a message is shown


class App:
    """Reads and draws until it is told to quit.

    read -- takes a reading. measure -- has the kernel time the programs or no longer, for the key
    that asks for it; tells of what it did.
    """

    def __init__(
        self,
        screen: Screen,
        shapes: Glyphs,
        view: board.View,
        *,
        read: Callable[[], TopReport],
        measure: Callable[[bool], str],
    ) -> None:
        self._screen, self._shapes, self.view = screen, shapes, view
        self._read, self._measure = read, measure
        self._trends: dict[str, Trend] = {}
        self._report = self._drawn = read()  # drawn: what is seen while paused
        self._keys = Keys()
        self._help = self._quit = False
        self._stopped = self._resized = False
        self._message_until = 0.0

    def run(self, source: int) -> None:
        """Until q. Interrupted when a signal ends it; the terminal has been given back then."""
        with _signals(self._on_signal) as woken, self._screen:
            due = time.monotonic()
            while not self._quit:
                if time.monotonic() >= due:
                    self._take()
                    self._draw()
                    due = max(due + self.view.interval, time.monotonic())
                timeout = max(due - time.monotonic(), 0.0)
                if self._keys.waiting:
                    timeout = min(timeout, _ESCAPE_ALONE)
                ready, _, _ = select.select([source, woken], [], [], timeout)
                if woken in ready:
                    os.read(woken, 64)
                    self._after_signals()
                before = self.view.interval
                pressed = self._pressed(source if source in ready else None)
                for key in pressed:
                    self._press(key)
                if self.view.interval != before:
                    due = min(due, time.monotonic() + self.view.interval)
                if pressed:
                    self._draw()

    def _take(self) -> None:
        self._report = self._read()
        for device in self._report.devices:
            trend = self._trends.setdefault(device.device, Trend())
            if device.write_rate is not None:
                trend.add(self._report.time, device.write_rate)
        if not self.view.paused:
            self._drawn = self._report
        if self.view.message and time.monotonic() > self._message_until:
            self.view.message = ""

    def _draw(self) -> None:
        width, height = self._screen.size
        if self._help:
            lines = help.page(width, height, self._shapes)
        else:
            lines = board.draw(
                self._drawn, self._trends, self.view, self._shapes, width=width, height=height
            )
        self._screen.draw(lines)

    def _pressed(self, source: int | None) -> list[str]:
        if source is None:
            return self._keys.flush()
        data = os.read(source, 256)
        if not data:
            raise lost()
        return self._keys.feed(data)

    def _press(self, key: str) -> None:
        if key == "q":
            self._quit = True
        elif self._help:
            self._help = False
        elif key in ("?", "h"):
            self._help = True
        elif key in ("p", " "):
            self.view.paused = not self.view.paused
            self._drawn = self._report
        elif key == "s":
            self.view.order = (self.view.order + 1) % len(board.ORDERS)
        elif key in ("r", "S"):
            self.view.reverse = not self.view.reverse
        elif key in ("+", "=", "-"):
            self._pace(1 if key != "-" else -1)
        elif key == "c":
            self.view.measuring = not self.view.measuring
            self.tell(self._measure(self.view.measuring))
        else:
            self._choose(key)

    def _pace(self, by: int) -> None:
        """The next longer or shorter interval; that of the command line may be in between."""
        now = self.view.interval
        found = [at for at in INTERVALS if (at > now if by > 0 else at < now)]
        self.view.interval = (found[0] if by > 0 else found[-1]) if found else now

    def _choose(self, key: str) -> None:
        names = [device.device for device in board.ordered(self._drawn.devices, self.view)]
        at = names.index(self.view.chosen) if self.view.chosen in names else 0
        moves = {"j": 1, "down": 1, "k": -1, "up": -1, "page down": _PAGE, "page up": -_PAGE}
        moves |= {"home": -len(names), "end": len(names)}
        if names and key in moves:
            self.view.chosen = names[min(max(at + moves[key], 0), len(names) - 1)]

    def tell(self, message: str) -> None:
        """Show it for a while in the last line."""
        self.view.message, self._message_until = message, time.monotonic() + _TOLD

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Raises out of whatever is going on, also a write that the terminal does not take."""
        if number in _ENDING:
            for ending in _ENDING:  # one is enough: the terminal has to be given back now
                signal.signal(ending, signal.SIG_IGN)
            raise Interrupted("top was interrupted", signum=number)
        self._stopped |= number == signal.SIGTSTP
        self._resized |= number in (signal.SIGWINCH, signal.SIGCONT)

    def _after_signals(self) -> None:
        if self._stopped:
            self._screen.leave()
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)  # the shell has us here until we go on
            signal.signal(signal.SIGTSTP, handler)
        if self._stopped or self._resized:
            self._stopped = self._resized = False
            self._screen.enter()
            self._draw()


@contextlib.contextmanager
def _signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[int]:
    """A descriptor that can be read when one came. Those that are ignored, as by nohup, stay so."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    wanted = (*_ENDING, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
    caught = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield reading
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(reading)
        os.close(writing)
