"""Who is told how a long operation goes on."""

from __future__ import annotations

from typing import Protocol

FREEZE = "freeze"
ASKING = "connecting"  # ssh may be asking on the terminal
HUSHED = (FREEZE, ASKING)


class Observer(Protocol):
    """Who watches a long operation. All is told by the thread that does it."""

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` bytes begins; 0 if nobody knows, or if bytes are no measure of it.

        While FREEZE lasts, which is until the next phase, nothing may be written: the file system
        that holds the log may be the one that is frozen. Nor while ASKING does: the line on the
        terminal is that of another program.
        """

    def done(self, count: int) -> None:
        """So many bytes of the phase are dealt with."""

    def warn(self, message: str) -> None:
        """Something went wrong that the operator has to see to, and the point is good."""


class _Nobody:
    def phase(self, name: str, total: int) -> None: ...

    def done(self, count: int) -> None: ...

    def warn(self, message: str) -> None: ...


NOBODY: Observer = _Nobody()
