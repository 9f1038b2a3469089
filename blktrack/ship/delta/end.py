"""A delta as the end of a copy that is only written."""

from __future__ import annotations

import errno
import os

from blktrack.ship.delta.writer import DeltaWriter
from blktrack.ship.end import Endpoint


class DeltaEnd(Endpoint):
    """What is written here becomes frames. There is nothing to be read."""

    def __init__(self, path: str, writer: DeltaWriter) -> None:
        super().__init__(path, writer.header.size, align=1)
        self._writer = writer
        self._zero_ways = [writer.zero]

    def _read(self, view: memoryview, offset: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _write(self, view: memoryview, offset: int) -> None:
        self._writer.data(offset, view)

    def _sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        """The stream is its owner's to end."""
