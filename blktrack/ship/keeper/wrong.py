"""What the source may not say."""

from __future__ import annotations

from blktrack.errors import BlktrackError
from blktrack.ship.wire.errors import ProtocolError

SOURCE = "the source"


def wrong(what: str) -> BlktrackError:
    """An error of a clause that says what the source does."""
    return ProtocolError(SOURCE, what)
