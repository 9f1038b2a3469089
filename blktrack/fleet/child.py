"""A process for one piece of work, which no crash, kill or lack of memory in it carries further.

It is forked, not started anew: all modules are loaded, and most of its memory is shared. The
parent must have no threads. What it has to tell goes through a pipe, one JSON object per line; the
end of the pipe is the end of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from blktrack import linux

Message = dict[str, Any]

_EVERY = 0.2  # seconds between two messages of progress
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Sender:
    """The child's end. An Observer: it never waits for whoever watches it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._last = 0.0
        os.set_blocking(fd, False)

    def phase(self, name: str, total: int) -> None:
        self._last = 0.0
        self.send(kind="phase", name=name, total=total)

    def done(self, count: int) -> None:
        now = time.monotonic()
        if now - self._last >= _EVERY:
            self._last = now
            with contextlib.suppress(OSError):
                # A full pipe takes all of a short line or nothing: this one is left out.
                os.write(self._fd, _line({"kind": "done", "count": count}))

    def warn(self, message: str) -> None:
        self.send(kind="warn", message=message)

    def send(self, **message: Any) -> None:
        """All of a message, waiting for room. Nothing if nobody is left to hear it."""
        data = _line(message)
        room = select.poll()
        room.register(self._fd, select.POLLOUT)
        with contextlib.suppress(BrokenPipeError):
            while data:
                room.poll()
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self._fd, data) :]


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


@dataclass
class Child:
    """The parent's end."""

    pid: int
    fd: int
    told: bool = False  # it was sent a signal
    _part: bytes = field(default=b"", repr=False)

    @classmethod
    def begin(cls, work: Callable[[Sender, Callable[[], None]], None]) -> Self:
        """Fork. `work` gets what to send with, and what to call when it is ready for SIGINT,
        SIGTERM and SIGHUP, which are held back until then. OSError if no process can be had."""
        read, write = os.pipe()
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                _live(write, parent, work, lambda: _unblock(before))
        except OSError:
            os.close(read)
            raise
        finally:
            os.close(write)
            _unblock(before)
        return cls(pid, read)

    def fileno(self) -> int:
        return self.fd

    def read(self) -> tuple[list[Message], bool]:
        """What has come, and whether more may come; waits for one or the other."""
        data = os.read(self.fd, 1 << 16)
        *lines, self._part = (self._part + data).split(b"\n")
        return [json.loads(line) for line in lines], bool(data)

    def tell(self, number: int) -> None:
        """Send a signal, once: a second one would end it on the spot."""
        if not self.told:
            self.told = True
            os.kill(self.pid, number)

    def reap(self) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _unblock(before: set[Any]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _live(
    write: int,
    parent: int,
    work: Callable[[Sender, Callable[[], None]], None],
    ready: Callable[[], None],
) -> NoReturn:
    code = 1
    try:
        # A parent that was killed leaves nobody behind; it may be gone already.
        linux.end_with_parent(signal.SIGTERM)
        if os.getppid() == parent:
            # Not of the terminal's foreground group: of a Ctrl-C the parent tells it, once.
            os.setpgid(0, 0)
            # The parent's locks and the pipes of others are not ours to hold open.
            os.closerange(3, write)
            os.closerange(write + 1, os.sysconf("SC_OPEN_MAX"))
            work(Sender(write), ready)
            code = 0
    finally:
        os._exit(code)
