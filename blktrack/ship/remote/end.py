"""The far end of a copy: what is written here becomes messages; what differs is asked for."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

from blktrack.linux import Buffer
from blktrack.ship.aio import RequestQueue
from blktrack.ship.delta.codec import Compressor
from blktrack.ship.delta.format import Codec
from blktrack.ship.end import Endpoint
from blktrack.ship.plan import Piece
from blktrack.ship.remote.client import Client
from blktrack.ship.remote.wire import Wire
from blktrack.ship.wire import digests
from blktrack.ship.wire.errors import ProtocolError
from blktrack.ship.wire.message import MAX_DATA, MAX_ROWS, Kind, pack


class FarEnd(Endpoint):
    """Bytes of a replica or of a stage beside it, elsewhere. Nothing of them is ever read."""

    mark: int  # how much of a stage its keeper has told to be durable

    def __init__(self, path: str, size: int, client: Client, key: bytes, wire: Wire) -> None:
        super().__init__(path, size, align=1)
        self._client = client
        self._key = key
        self._wire = wire
        self._compressor = Compressor()
        self._zero_ways = [self._send_zero]
        self.mark = 0

    def write_many(
        self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
    ) -> None:
        for some in _bounded(pieces):
            rows = [(start, length) for start, length, _ in some]
            self._send(rows, [buffer.view[at : at + length] for _, length, at in some])

    def _write(self, view: memoryview, offset: int) -> None:
        for start in range(0, len(view), MAX_DATA):
            part = view[start : start + MAX_DATA]
            self._send([(offset + start, len(part))], [part])

    def _send(self, rows: list[tuple[int, int]], parts: list[memoryview]) -> None:
        length = sum(len(part) for part in parts)
        level = self._wire.level.choose()
        codec, data = Codec.NONE, list[bytes | memoryview](parts)
        compress_s = cpu_s = 0.0
        if level is not None:
            begun, used = time.monotonic(), time.thread_time()
            whole = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
            if packed := self._compressor.compress(whole, level):
                codec, data = Codec.ZSTD, [packed]
            compress_s, cpu_s = time.monotonic() - begun, time.thread_time() - used
        message = pack(Kind.WRITE, rows=rows, data=data, codec=codec, length=length)
        send_s = self._client.tell(message)
        stored = sum(len(part) for part in data)
        self._wire.level.note(
            level, length, stored, compress_s=compress_s, cpu_s=cpu_s, send_s=send_s
        )

    def _send_zero(self, start: int, length: int) -> None:
        self._client.tell(pack(Kind.ZERO, rows=[(start, length)]))

    def differences(
        self,
        pieces: list[Piece],
        source: Buffer,
        replica: Buffer,
        requests: RequestQueue | None,
        granularity: int,
    ) -> list[Piece]:
        """As of any end, but asked for by digests; `replica` and `requests` are not needed."""
        found: list[Piece] = []
        unit = min(granularity, digests.UNIT).to_bytes(4, "little")
        for some in _bounded(pieces):
            rows = [(start, length) for start, length, _ in some]
            said = unit + digests.describe(some, source, self._key)

            def make(number: int, rows: list[tuple[int, int]] = rows, said: bytes = said):  # type: ignore[no-untyped-def]
                return pack(Kind.COMPARE, number, rows, [said])

            answered = self._client.ask(make)
            try:
                if answered.kind is not Kind.DIGESTS:
                    raise ValueError(f"{answered.kind.name}")
                found += digests.different(some, answered.data, source, self._key, granularity)
            except ValueError as error:
                raise ProtocolError(self.path, f"it answers a comparison by {error}") from error
        return found

    def _sync(self) -> None:
        self.mark = self._client.request(Kind.FLUSH, {}).number("mark")
        self._wire.durable()

    def _read(self, view: memoryview, offset: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def close(self) -> None:
        """The connection is its owner's to end."""


def _bounded(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """In their order, as many as one message takes."""
    some: list[Piece] = []
    size = 0
    for piece in pieces:
        if some and (size + piece.length > MAX_DATA or len(some) == MAX_ROWS):
            yield some
            some, size = [], 0
        some.append(piece)
        size += piece.length
    if some:
        yield some
