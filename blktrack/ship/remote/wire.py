"""How a run speaks over its connections, and what it has said over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from blktrack.rates import UNLIMITED, Rates
from blktrack.ship.wire import hello
from blktrack.ship.wire.pace import Level, Setting


@dataclass
class Wire:
    """How a run speaks over its connections, and how much it has said."""

    compress: Setting = "adapt"  # zstd's level
    limit: Rates = UNLIMITED  # bytes sent per second
    patience: float = hello.PATIENCE  # seconds of silence after which a side is taken for dead
    interactive: bool = False  # whether ssh may ask on the terminal
    sent: int = 0  # bytes, of all connections that have ended
    received: int = 0
    durable: Callable[[], None] = lambda: None  # called when the far side holds more durably
    level: Level = field(init=False)

    def __post_init__(self) -> None:
        self.level = Level(self.compress)
