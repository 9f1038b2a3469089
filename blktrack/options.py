"""What a round is asked for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from blktrack.errors import BlktrackError, Interrupted, NoPoint
from blktrack.history import KEEP
from blktrack.observer import Observer
from blktrack.point import Point
from blktrack.quiesce.freeze import CAP
from blktrack.rates import UNLIMITED, Rates
from blktrack.ship.wire.hello import PATIENCE
from blktrack.ship.wire.pace import Setting
from blktrack.units import format_promise

__all__ = ["Observer", "Options"]


@dataclass
class Options:
    full: bool = False  # ship everything
    resync: str = ""  # compare everything, for this reason
    no_resync: bool = False
    force: bool = False
    # Bytes per second: of the source read, or sent to another host where the replica is on one.
    limit: Rates = UNLIMITED
    consistency: str = "crash"  # or none, or filesystem: what a point must be
    in_place: bool = False  # an increment too goes straight into the replica
    freeze: bool = True  # where rounds do not get smaller, a crash point may be taken under one
    cap: float = CAP  # seconds that a freeze may last
    pre: tuple[str, ...] = ()  # hooks, run before a freeze: for `filesystem` always, mounted or not
    post: tuple[str, ...] = ()  # and after it, on every way out
    history: float = KEEP  # seconds for which what runs did is remembered
    stop: threading.Event = field(default_factory=threading.Event)
    signum: int = 0  # set together with `stop`
    announced: Point | None = (
        None  # the point that a receiver was asked to commit last, by this run
    )
    # Of a replica on another host:
    compress: Setting = "adapt"  # zstd's level
    retry_for: float = 60.0  # seconds without progress in which a lost connection is tried again
    patience: float = PATIENCE  # seconds of silence after which the other side is taken for dead
    interactive: bool = False  # whether ssh may ask on the terminal
    time_limit: float | None = None  # seconds after which a run gives up, to go on another time
    time_left: float | None = None  # of the limit, where it began before this run; None: all
    expired: bool = False  # set together with `stop`: the time is over

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Around a run: it is stopped when its time is over."""
        if self.time_limit is None:
            yield
            return
        left = self.time_limit if self.time_left is None else self.time_left
        timer = threading.Timer(max(left, 0.0), self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self.expired = not self.stop.is_set()
        self.stop.set()

    def interrupted(self, message: str, hint: str) -> BlktrackError:
        """Why a run ended that was stopped: by a signal, or as its time was over."""
        if self.expired:
            limit = format_promise(self.time_limit or 0.0)
            return NoPoint(f"{message}: its time limit of {limit} is over", hint=hint)
        return Interrupted(message, signum=self.signum, hint=hint)
