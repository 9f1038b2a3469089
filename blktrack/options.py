"""What a round is asked for, and who watches it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol

from blktrack.history import KEEP
from blktrack.quiesce.freeze import CAP
from blktrack.rates import UNLIMITED, Rates


class Observer(Protocol):
    """Who watches a long operation."""

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` bytes begins."""

    def done(self, count: int) -> None:
        """So many bytes of the phase are dealt with."""

    def warn(self, message: str) -> None:
        """Something went wrong that the operator has to see to, and the point is good."""


@dataclass
class Options:
    full: bool = False  # ship everything
    resync: str = ""  # compare everything, for this reason
    no_resync: bool = False
    force: bool = False
    limit: Rates = UNLIMITED  # bytes of the source read per second
    consistency: str = "crash"  # or none, or filesystem: what a point must be
    in_place: bool = False  # an increment too goes straight into the replica
    freeze: bool = True  # where rounds do not get smaller, a crash point may be taken under one
    cap: float = CAP  # seconds that a freeze may last
    pre: tuple[str, ...] = ()  # hooks, run before a freeze: for `filesystem` always, mounted or not
    post: tuple[str, ...] = ()  # and after it, on every way out
    history: float = KEEP  # seconds for which what runs did is remembered
    stop: threading.Event = field(default_factory=threading.Event)
    signum: int = 0  # set together with `stop`
