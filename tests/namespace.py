"""Processes with mounts of their own, in which a test may install what it likes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.blockdev import TOP, Done, Lab


class Namespace:
    """Lives as long as the lab; nothing mounted in it is seen outside."""

    def __init__(self, lab: Lab, script: str, options: Sequence[str] = ()) -> None:
        """Runs a shell script, which ends with what says `ready`, as root of the namespace."""
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", *options, "sh", "-ec", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        lab.stack.callback(self._end)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *words: str | Path) -> Done:
        command = ["nsenter", "-t", str(self.process.pid), "--mount", *(str(w) for w in words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP)
        return Done(done.returncode, done.stdout, done.stderr)

    def blktrack(self, *words: str | Path) -> Done:
        return self.run(Path(sys.executable).with_name("blktrack"), *words)

    def read(self, path: str | Path) -> str:
        done = self.run("cat", path)
        assert done.code == 0, done.err
        return done.out

    def files(self, *folders: str | Path) -> set[str]:
        """All files and links below these folders."""
        return set(self.run("find", *folders, "!", "-type", "d").out.split())

    def _end(self) -> None:
        self.process.kill()
        self.process.communicate()
