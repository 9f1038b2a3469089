"""What a round is asked for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from blktrack.history import KEEP
from blktrack.observer import Observer
from blktrack.quiesce.freeze import CAP
from blktrack.rates import UNLIMITED, Rates

__all__ = ["Observer", "Options"]


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
