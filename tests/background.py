"""Commands that run while a test does something to what they work on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.blockdev import TOP, Done, Lab, wait_until

TRACEBACK = "Traceback (most recent call last)"
# A command with mounts of its own, into which `inside` gets.
UNSHARED = ("unshare", "--mount", "--propagation=private")


class Running:
    """A blktrack command in the background, which does not outlive the test."""

    def __init__(
        self,
        lab: Lab,
        *words: str | Path,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int = subprocess.PIPE,
    ) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "blktrack", *(str(word) for word in words)],
            cwd=TOP,
            env={**os.environ, **(env or {})},
            text=True,
            errors="replace",  # what `send` writes is no text
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        lab.stack.callback(self._kill)

    def until_open(self, *paths: str | Path) -> None:
        """Wait until it has these devices or files open: then it copies."""
        for path in paths:
            wait_until(lambda path=path: self._has_open(str(path)), f"the opening of {path}")  # type: ignore[misc]

    def _has_open(self, path: str) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        found = False
        with contextlib.suppress(OSError):  # it closes others meanwhile
            for entry in os.scandir(f"/proc/{self.process.pid}/fd"):
                with contextlib.suppress(OSError):
                    found |= os.readlink(entry.path) == path
        return found

    def inside(self, *command: str | Path) -> None:
        """Run a tool in its mount namespace."""
        words = ["nsenter", "-t", str(self.process.pid), "--mount", *(str(w) for w in command)]
        subprocess.run(words, check=True)

    def end(self, patience: float = 60) -> Done:
        out, err = self.process.communicate(timeout=patience)
        return Done(self.process.returncode, out, err)

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def past_start(process: subprocess.Popen[str]) -> Callable[[], bool]:
    """Whether our code runs by now: SIGINT was caught, by Python as it starts, and is not any more.

    During Python's own start it ends in a traceback of Python's. True as well for what has ended.
    """
    seen = False

    def past() -> bool:
        nonlocal seen
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return True
        line = next((text for text in status.split("\n") if text.startswith("SigCgt:")), "")
        caught = bool(int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1) if line else False
        seen = seen or caught
        return (seen and not caught) or process.poll() is not None

    return past


def assert_clear(done: Done, code: int, *says: str) -> None:
    """It ended with this code, one sentence and one hint; nothing came on standard output."""
    assert done.code == code, done
    assert done.out == ""
    assert TRACEBACK not in done.err
    sentence, *hint = done.err.strip().split("\n")
    assert sentence.startswith("blktrack: "), done.err
    assert len(hint) == 1 and hint[0].startswith("  -> "), done.err
    for words in says:
        assert words in done.err, done.err
