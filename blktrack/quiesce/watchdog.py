"""Freezing under guard: another process thaws if this one cannot.

Who does what, so that no death and no hang leaves a file system frozen:

- this process freezes, because that can take as long as the device takes;
- the guard thaws, and it alone while it lives: when its pipe from here closes, which every way out
  of this process does, or at the cap. What is frozen it thaws even while the freeze of another
  hangs;
- a thread waits for the guard to die, and then thaws at once: without a guard nothing stays frozen.

Only if both are killed at the same instant does it stay frozen: `fsfreeze --unfreeze` ends that.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from blktrack import linux
from blktrack.errors import BlktrackError

_PROGRAM = Path(__file__).with_name("guard.py")
_PATIENCE = 10.0  # seconds that the guard may take to start, or to thaw on a device that works


class Watchdog:
    """Freezes file systems, given as descriptors, for at most `cap` seconds from the first on."""

    def __init__(self, fds: Sequence[int], cap: float) -> None:
        self.fds, self.cap = list(fds), cap
        self.began = self.ended = 0.0  # monotonic
        self.lost = ""  # why the freeze ended early, as a clause
        self._frozen: list[int] = []
        self._beginning: list[int] = []
        self._ready, self._over = threading.Event(), False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener = threading.Thread(target=self._listen, name="freeze", daemon=True)

    def start(self) -> None:
        """Have the guard started; `release` ends it, and is to be called even if this fails."""
        words = [str(self.cap), str(linux.FITHAW), *map(str, self.fds)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            pass_fds=self.fds,
            start_new_session=True,
        )
        self._listener.start()

    def wait_ready(self) -> None:
        """To be called before the first freeze."""
        if not self._ready.wait(_PATIENCE) or self.lost:
            raise BlktrackError(
                "the process that guards a freeze did not start",
                hint=f"try {sys.executable} -I -S {_PROGRAM} 1 0",
            )

    def freeze(self, index: int) -> None:
        """OSError as of `linux.freeze`."""
        self._beginning = [index]
        self._tell(b"b", index)
        self.began = self.began or time.monotonic()
        try:
            linux.freeze(self.fds[index])
        except OSError:
            self._beginning = []
            self._tell(b"n", index)
            raise
        with self._lock:
            self._frozen.append(index)
            self._beginning = []
        self._tell(b"f", index)

    def release(self) -> None:
        """Thaw all. After it `lost` is final and the guard is gone."""
        if self._process is None:
            return
        assert self._process.stdin and self._process.stdout
        listening = self._listener.ident is not None
        try:
            self._process.stdin.close()
            if listening:
                self._listener.join(_PATIENCE)
            if self._listener.is_alive():  # stopped, say
                self._process.kill()
        finally:
            if listening:
                self._listener.join()
            self._process.wait()
            self._process.stdout.close()
        if not self._over:
            self._thaw(self._frozen)
            self._thaw(self._beginning)
        self.ended = self.ended or time.monotonic()

    def _tell(self, word: bytes, index: int) -> None:
        assert self._process and self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the listener sees to it
            self._process.stdin.write(word + bytes([index]))

    def _listen(self) -> None:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            word, *rest = line.decode("ascii").split()
            if word == "ready":
                self._ready.set()
                continue
            self.ended = float(rest[0]) or self.ended
            if word == "cap":
                self.lost = self.lost or f"it lasted longer than the {self.cap:g} s allowed"
            else:
                self._over = True
            if rest[1] == "foreign":
                self.lost = self.lost or "somebody else thawed it"
        if not self._over:
            self.lost = self.lost or "the process that guards it was killed"
            with self._lock:
                self._thaw(self._frozen)
        self._ready.set()

    def _thaw(self, indexes: list[int]) -> None:
        while indexes:
            with contextlib.suppress(OSError):
                linux.thaw(self.fds[indexes.pop()])
            self.ended = time.monotonic()
