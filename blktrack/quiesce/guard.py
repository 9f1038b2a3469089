"""The process that ends a freeze when nobody else does. A program of its own: see `Watchdog`.

    python -I -S guard.py CAP FITHAW FD...

Standard input carries what `Watchdog` does to file system I (a byte), as two bytes each: `b I` it
begins to freeze it, `f I` it is frozen, `n I` it is not. Its end, by a close or by a death, ends
the freeze; so does CAP, in seconds since the first `b`. Standard output tells, a line each:
`ready`, then `cap` or `end` with the monotonic time of the last thaw, 0 if there was none, and
`ours`, or `foreign` if one was not frozen any more.

While a file system is frozen nothing here may write to one or wait for memory: all is imported and
locked before `ready`, messages of Python's own go nowhere.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Collection

LOOK = 50  # milliseconds between two looks at a process that may have been stopped
MCL_CURRENT_AND_FUTURE = 3  # sys/mman.h; the machines where it is not simply refuse it


def prepare() -> None:
    """Be hard to kill and stay in memory. Where that is not allowed it does without."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    ctypes.CDLL(None).mlockall(MCL_CURRENT_AND_FUTURE)


def say(word: str) -> None:
    with contextlib.suppress(OSError):  # nobody is left to hear it
        os.write(1, f"{word}\n".encode())


def is_stopped(pid: int) -> bool:
    """Whether its main thread, which is the one that freezes, is stopped by a signal."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


class Guard:
    def __init__(self, cap: float, fithaw: int, fds: list[int]) -> None:
        self.cap, self.fithaw, self.fds = cap, fithaw, fds
        self.frozen: list[int] = []
        self.beginning: list[int] = []  # one, while its freeze is under way
        self.deadline: float | None = None
        self.expired = False
        self.owner = os.getppid()

    def run(self) -> None:
        input_ends = select.poll()
        input_ends.register(0, select.POLLIN)
        say("ready")
        while True:
            wait = None
            if self.deadline is not None and not self.expired:
                wait = max(0.0, self.deadline - time.monotonic()) * 1000
            elif self.expired and self.beginning:
                wait = LOOK
            if input_ends.poll(wait):
                data = os.read(0, 4096)
                if not data:
                    break
                for at in range(0, len(data), 2):
                    self.take(data[at : at + 1], data[at + 1])
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.expired = True
                if self.beginning and is_stopped(self.owner):
                    # In no call any more, and it may have been stopped before it could say `f`.
                    unsure, self.beginning = self.beginning, []
                    self.frozen += unsure
                    self.thaw("cap", unsure)
                self.thaw("cap")
        # Whoever was beginning one is through with it or dead: now it is known to be frozen or not.
        self.frozen += self.beginning
        self.thaw("end", self.beginning)

    def take(self, word: bytes, index: int) -> None:
        self.beginning = [index] if word == b"b" else []
        if word == b"f":
            self.frozen.append(index)
        if self.deadline is None:
            self.deadline = time.monotonic() + self.cap

    def thaw(self, why: str, unsure: Collection[int] = ()) -> None:
        """The last frozen first. One whose freeze is under way cannot be thawed before it is."""
        if why == "cap" and not self.frozen:
            return
        whose, last = "ours", 0.0
        while self.frozen:
            index = self.frozen.pop()
            try:
                fcntl.ioctl(self.fds[index], self.fithaw, 0)
            except OSError as error:
                if error.errno != errno.EINVAL or index not in unsure:
                    whose = "foreign"
            last = time.monotonic()
        say(f"{why} {last} {whose}")


if __name__ == "__main__":
    prepare()
    Guard(float(sys.argv[1]), int(sys.argv[2]), [int(word) for word in sys.argv[3:]]).run()
    os._exit(0)
