"""The terminal: taken over and given back, and only what changed is written to it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import termios
import tty
from collections.abc import Iterator
from typing import Any, Self

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from blktrack.errors import Interrupted
from blktrack.tui.look import ASCII, PLAIN, Glyphs, Line

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J"  # the other screen, no cursor, empty
_LEAVE = "\x1b[?25h\x1b[0m\x1b[{rows};1H\x1b[?1049l"  # where there is no other: below what is there
_CLEAR = "\x1b[0m\x1b[H\x1b[2J"
_NEAR = (
    6  # cells that did not change are written again rather than jumped over, which takes as many
)
_BLANK = (" ", PLAIN)
_UNUSABLE = ("", "dumb", "unknown")
# While the terminal is given back: a second signal must not leave it half-way.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGWINCH}

Cell = tuple[str, Style]


def usable(source: int, target: int) -> bool:
    """Whether both are a terminal that one can draw on."""
    both = os.isatty(source) and os.isatty(target)
    return both and os.environ.get("TERM", "").lower() not in _UNUSABLE


def lost() -> Interrupted:
    """The terminal has gone; its signal may be on its way, or is for others."""
    return Interrupted("top lost its terminal", signum=signal.SIGHUP)


class Screen:
    """A context: the terminal is ours in it, and as it was after it, whatever ends it."""

    def __init__(self, source: int, target: int, shapes: Glyphs) -> None:
        self._source, self._target = source, target
        self._encoding = "ascii" if shapes is ASCII else "utf-8"
        console = Console()
        systems = {"standard": "STANDARD", "256": "EIGHT_BIT", "truecolor": "TRUECOLOR"}
        name = systems.get(console.color_system or "standard", "STANDARD")
        self._system = ColorSystem[name]
        self._colours = not console.no_color and console.color_system is not None
        self._codes: dict[Style, str] = {}
        self._shown: list[list[Cell]] = []
        self._lines: list[Line] = []
        self._before: list[Any] | None = None
        self.written = 0  # bytes

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows; those of a terminal that does not tell are 80 and 24."""
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(self._target)
            if columns and rows:
                return columns, rows
        return 80, 24

    def enter(self) -> None:
        if self._before is None:
            self._before = termios.tcgetattr(self._source)
        # Also where it was ours: a shell that we were stopped under has made it its own.
        tty.setcbreak(self._source, termios.TCSANOW)  # Ctrl-C, Ctrl-Z stay signals
        self.forget()
        self._write(_ENTER)

    def leave(self) -> None:
        """Give it back; twice is once. A terminal that is gone is no error."""
        if self._before is None:
            return
        with contextlib.suppress(OSError, termios.error):
            # Stopped by Ctrl-S nothing would get out; only what TCOOFF stopped does TCOON start.
            termios.tcflow(self._target, termios.TCOOFF)
            termios.tcflow(self._target, termios.TCOON)
        with contextlib.suppress(OSError, Interrupted):
            self._write(_LEAVE.format(rows=self.size[1]))
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(self._source, termios.TCSANOW, self._before)
        self._before = None

    def __enter__(self) -> Self:
        with _undisturbed():
            self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        with _undisturbed():
            self.leave()

    def forget(self) -> None:
        """What is on the terminal is not known (any more): the next drawing clears it."""
        self._shown, self._lines = [], []

    def draw(self, lines: list[Line]) -> None:
        """Make the terminal show these lines, which have to fit."""
        width, height = self.size
        text = ""
        if len(self._shown) != height or (self._shown and len(self._shown[0]) != width):
            text, self._lines = _CLEAR, []
            self._shown = [[_BLANK] * width for _ in range(height)]
        for number, line in enumerate(lines[:height]):
            if number < len(self._lines) and line == self._lines[number]:
                continue
            row = _cells(line, width)
            text += "".join(self._changes(number, self._shown[number], row))
            self._shown[number] = row
        self._lines = lines
        if text:
            self._write(text)

    def _changes(self, number: int, old: list[Cell], new: list[Cell]) -> Iterator[str]:
        """What makes row `number` look like `new`."""
        width = len(new)
        end = width
        while end and new[end - 1] == _BLANK:
            end -= 1
        differ = [at for at in range(width) if old[at] != new[at]]
        position = 0
        while position < len(differ):
            start = last = differ[position]
            if start >= end and len(differ) - position > 3:  # only blanks to the end of the row
                yield f"\x1b[{number + 1};{start + 1}H\x1b[K"
                return
            while position < len(differ) and differ[position] - last <= _NEAR:
                last = differ[position]
                position += 1
            while start and not new[start][0]:  # never the second half of a wide letter
                start -= 1
            yield f"\x1b[{number + 1};{start + 1}H{self._run(new[start : last + 1])}"

    def _run(self, cells: list[Cell]) -> str:
        text, style = "", PLAIN
        for letter, next_style in cells:
            if next_style is not style:
                text += self._code(next_style, after=style)
                style = next_style
            text += letter
        return text + self._code(PLAIN, after=style)

    def _code(self, style: Style, *, after: Style) -> str:
        """The sequence that leads from one style to another."""
        code = self._codes.get(style)
        if code is None:
            own = style if self._colours else style.without_color
            match = re.match("\x1b\\[[0-9;]*m", own.render("x", color_system=self._system))
            self._codes[style] = code = match[0] if match else ""
        return f"\x1b[0m{code}" if self._codes.get(after) else code

    def _write(self, text: str) -> None:
        data = memoryview(text.encode(self._encoding, "replace"))
        self.written += len(data)
        try:
            while data:
                data = data[os.write(self._target, data) :]
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise lost() from error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cells(line: Line, width: int) -> list[Cell]:
    """A letter for each cell of a row; a wide one is followed by an empty one."""
    row: list[Cell] = []
    for text, style, _ in line:
        own = style or PLAIN
        if cell_len(text) == len(text):
            row += [(letter, own) for letter in text]
            continue
        for letter in text:
            row.append((letter, own))
            row += [("", own)] * (cell_len(letter) - 1)
    del row[width:]
    return row + [_BLANK] * (width - len(row))
