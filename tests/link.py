"""A link that a test bends and breaks: a shaper (tests/shaper.py) and its reins."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Literal

from tests.blockdev import TOP, wait_until
from tests.lane import Shape
from tests.netns import Host

Break = Literal["cut", "refuse", "freeze"]


@dataclass(frozen=True)
class Passed:
    """Bytes of one direction since the link was made. What was taken and did not pass is under way,
    or lost in a cut."""

    taken: int
    passed: int


@dataclass(frozen=True)
class Counts:
    up: Passed  # from near to far
    down: Passed
    accepted: int  # connections since the link was made
    open: int  # and now
    sprung: int  # traps


class Link:
    """Listens at 127.0.0.1, `port`, of `host` and relays to `target`. Unshaped to begin with.

    Where the target does not answer, a connection is accepted and then reset.
    """

    host = "127.0.0.1"

    def __init__(self, host: Host, target: tuple[str, int], seed: int = 0) -> None:
        # -S: it needs nothing but Python's own modules.
        command = [sys.executable, "-S", "-m", "tests.shaper", target[0], str(target[1]), str(seed)]
        pipe = subprocess.PIPE
        self.process = host.start(command, cwd=TOP, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        self._one = threading.Lock()  # a test and its striking thread take turns
        self.port = int(self._out.readline())

    def shape(
        self, both: Shape | None = None, *, up: Shape | None = None, down: Shape | None = None
    ) -> None:
        """From now on. A direction that is not named stays as it is."""
        shapes = {"up": both if up is None else up, "down": both if down is None else down}
        self._tell("shape", **{name: asdict(shape) for name, shape in shapes.items() if shape})

    def counts(self) -> Counts:
        return self._tell("count")

    def cut(self) -> None:
        """Reset all connections; what is under way is lost. New ones are let in."""
        self._tell("cut")

    def refuse(self) -> None:
        """cut(), and new connections are refused until accept()."""
        self._tell("refuse")

    def accept(self) -> None:
        self._tell("accept")

    def freeze(self) -> None:
        """Forward nothing more and say nothing: the far host has died. Connections stay open.

        New ones are made by the kernel, and nobody answers.
        """
        self._tell("freeze")

    def resume(self) -> None:
        self._tell("resume")

    def trap(self, lane: Literal["up", "down"], after: int, then: Break) -> None:
        """Do it as soon as `after` more bytes passed in this direction, and not one more."""
        self._tell("trap", lane=lane, after=after, then=then)

    def until_sprung(self, times: int = 1, patience: float = 30) -> None:
        """Wait until that many traps have sprung since the link was made."""
        wait_until(lambda: self.counts().sprung >= times, "the springing of the trap", patience)

    def _tell(self, what: str, **more: object) -> Counts:
        with self._one:
            self._in.write(json.dumps({"do": what, **more}) + "\n")
            self._in.flush()
            answer = json.loads(self._out.readline())
        return Counts(Passed(**answer.pop("up")), Passed(**answer.pop("down")), **answer)
