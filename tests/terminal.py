"""A program on a terminal of its own, as an operator has it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.blockdev import wait_until


class Terminal:
    """Runs a program on a pty until it is left. `screen` is all that came from it, raw."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        rows: int = 400,
        columns: int = 80,
    ) -> None:
        self.screen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                size = struct.pack("HHHH", rows, columns, 0, 0)
                fcntl.ioctl(0, termios.TIOCSWINSZ, size)
                os.execvpe(
                    command[0], list(command), {**os.environ, "TERM": "xterm", **(env or {})}
                )
            finally:
                os._exit(127)

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read(self) -> bool:
        """Take in what is there; whether more may come."""
        while select.select([self._fd], [], [], 0)[0]:
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError:  # EIO: its other side is closed
                return False
            if not data:
                return False
            self.screen += data.decode(errors="replace")
        return True

    def until(self, text: str) -> None:
        """Wait until this was shown."""

        def shown() -> bool:
            going = self.read()
            assert going or text in self.screen, f"it ended with: {self.screen[-2000:]!r}"
            return text in self.screen

        wait_until(shown, f"{text!r} on the terminal")

    def end(self) -> int:
        """Wait for the program; its exit code."""
        wait_until(lambda: not self.read(), "its end")
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
