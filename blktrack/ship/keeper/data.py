"""The bytes of a connection: what is written, what is zero, what is compared."""

from __future__ import annotations

import contextlib

from blktrack.errors import Refused
from blktrack.extent import Extent
from blktrack.linux import PAGE, Buffer
from blktrack.ship.aio import RequestQueue
from blktrack.ship.endpoint import EndError, Endpoint
from blktrack.ship.keeper.wrong import wrong
from blktrack.ship.plan import MAX_REQUESTS
from blktrack.ship.wire import digests
from blktrack.ship.wire.message import MAX_DATA, MAX_ROWS, Message

_LOOK = 128 << 10  # bytes of what is to be zero that are looked at before
_LEAST = 512  # bytes that are told apart


class Data:
    """Moves the bytes of messages, each checked against the end that it is for."""

    def __init__(self) -> None:
        self.key = b""  # of digests
        self.reads: Endpoint | None = None  # what is compared
        self.writes: Endpoint | None = None  # where what comes goes; None: nothing may come
        self.unit = 1  # bytes that whatever is written has to be a multiple of
        # Untouched pages of it cost nothing.
        self._buffer = Buffer(MAX_DATA + 2 * MAX_ROWS * PAGE)
        self._requests: RequestQueue | None = None
        self._tried = False

    def write(self, message: Message) -> None:
        rows = message.rows.tolist()
        end = self._checked(rows)
        pieces = digests.layout(rows)
        view, at = self._buffer.view, 0
        for piece in pieces:
            view[piece.at : piece.at + piece.length] = message.data[at : at + piece.length]
            at += piece.length
        end.write_many(pieces, self._buffer, self._requests_for(end))

    def zero(self, message: Message) -> None:
        rows = message.rows.tolist()
        end = self._checked(rows)
        for start, length in rows:
            if not (end is self.reads and self._is_zero(end, start, length)):
                end.zero(start, length)

    def compare(self, message: Message) -> bytes:
        """What is answered to digests."""
        end, rows = self.reads, message.rows.tolist()
        if end is None or any(start + length > end.size for start, length in rows):
            raise wrong("it compares what is not there")
        pieces = digests.layout(rows)
        end.read_all(pieces, self._buffer, self._requests_for(end))
        granularity = int.from_bytes(message.data[:4], "little")
        if granularity < _LEAST:
            raise wrong("it compares less than a sector")
        try:
            found = digests.answer(pieces, message.data[4:], self._buffer, self.key, granularity)
        except ValueError as error:
            raise wrong(f"it has not sent {error}") from error
        return b"".join(found)

    def _is_zero(self, end: Endpoint, start: int, length: int) -> bool:
        """A hole costs far more than a look."""
        if length > _LOOK:
            return False
        (piece,) = digests.layout([(start, length)])
        with contextlib.suppress(EndError):
            end.read_into(self._buffer.view[piece.at : piece.at + length], start)
            return self._buffer.is_zero(piece.at, length)
        return False

    def _requests_for(self, end: Endpoint) -> RequestQueue | None:
        """Where they are of use: to be made and given back takes the kernel 30 ms."""
        if end.align > 1 and not self._tried:
            self._tried = True
            with contextlib.suppress(OSError):
                self._requests = RequestQueue(MAX_REQUESTS)
        return self._requests

    def _checked(self, rows: list[list[int]]) -> Endpoint:
        end = self.writes
        if end is None:
            raise wrong("it writes before it has begun")
        for start, length in rows:
            if start + length > end.size:
                raise wrong(f"it writes {Extent(start, length)} of {end.size} bytes")
            if (start | length) % self.unit:
                raise Refused(
                    f"{end.path} has blocks of {self.unit} bytes, and the source an extent of"
                    f" {Extent(start, length)}",
                    hint="use a file as the replica, or a device with smaller logical blocks",
                )
        return end

    def close(self) -> None:
        if self._requests:
            self._requests.close()
