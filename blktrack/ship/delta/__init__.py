"""The delta: one stream that leads a replica from one point to the next.

docs/delta-format.md is the contract. A sender writes it with DeltaWriter, a receiver takes it apart
with DeltaReader and trusts nothing before `DeltaReader.trailer` is there.
"""

from blktrack.ship.delta.errors import (
    DeltaBroken,
    DeltaDamaged,
    DeltaError,
    DeltaForeign,
    DeltaInvalid,
    DeltaNewer,
    DeltaTruncated,
)
from blktrack.ship.delta.format import MAX_FRAME, VERSION, Kind
from blktrack.ship.delta.meta import Counts, Header, Trailer
from blktrack.ship.delta.reader import DeltaReader, Frame
from blktrack.ship.delta.writer import DeltaWriter

__all__ = [
    "MAX_FRAME",
    "VERSION",
    "Counts",
    "DeltaBroken",
    "DeltaDamaged",
    "DeltaError",
    "DeltaForeign",
    "DeltaInvalid",
    "DeltaNewer",
    "DeltaReader",
    "DeltaTruncated",
    "DeltaWriter",
    "Frame",
    "Header",
    "Kind",
    "Trailer",
]
