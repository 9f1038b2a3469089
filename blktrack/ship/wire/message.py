"""The messages of a connection: their bytes, limits and checksums.

    head      kind, codec, number of rows, request, bytes of data as stored, bytes of data, checksum
              of all that follows, checksum of these
    rows      starts and lengths of extents, 16 bytes each
    data      one JSON object, or the bytes that the kind says; compressed where the codec says so

All integers are little-endian and unsigned. Nothing is allocated by a length that was not held
against its limit, and nothing is handed out before its checksum holds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import xxhash

from blktrack.extent import ExtentArray
from blktrack.ship.delta.codec import Decompressor
from blktrack.ship.delta.errors import DeltaInvalid
from blktrack.ship.delta.format import MAX_FRAME, Codec, checksum
from blktrack.units import KIB

MAX_DATA = MAX_FRAME  # bytes of data of one message
MAX_ROWS = 1024
MAX_JSON = 64 * KIB

HEAD = struct.Struct("<BBHIIIQQ")
_CHECKED = 8  # bytes at the end of a head that hold the checksum of those before
_ROW = 16
_NO_ROWS = np.empty((0, 2), dtype=np.int64)


class Kind(IntEnum):
    """What a message is. From the source, then from the keeper."""

    OPEN = 1  # which target, for which source
    ROOM = 2  # can it hold the source as that is by now
    BEGIN = 3  # what follows goes straight into the replica, which leaves its point
    STAGE = 4  # what follows is staged beside it
    WRITE = 5  # rows and their bytes
    ZERO = 6  # rows that read as zeroes
    FLUSH = 7  # make durable all that came before
    COMPARE = 8  # rows and digests of their units
    SEAL = 9  # the stage is complete
    APPLY = 10  # bring it into the replica
    COMMIT = 11  # the replica is at a point
    PING = 12  # nothing, but that the source lives
    DONE = 64  # the answer to a request
    FAILED = 65  # no answer, and none will come: the keeper ends
    DIGESTS = 66  # the answer to COMPARE
    PROGRESS = 67  # of a request that takes long
    ALIVE = 68  # nothing, but that the keeper lives


_DATA = {Kind.WRITE}  # whose data may be compressed
_ROWS = {Kind.WRITE, Kind.ZERO, Kind.COMPARE}
_BOUNDED = {Kind.WRITE, Kind.COMPARE}  # whose extents have to fit a buffer
_BINARY = {Kind.WRITE, Kind.COMPARE, Kind.DIGESTS}  # what is not named in either has JSON
_EMPTY = {Kind.ZERO, Kind.PING, Kind.ALIVE}
_KINDS = {int(kind): kind for kind in Kind}
_CODECS = {int(codec): codec for codec in Codec}


class Malformed(Exception):
    """A clause: how a message breaks the format."""


class Message(NamedTuple):
    kind: Kind
    request: int  # which request it is, or answers; 0: none
    rows: ExtentArray  # as they were sent: any order
    data: memoryview | bytes

    def json(self) -> bytes:
        return bytes(self.data)


def pack(
    kind: Kind,
    request: int = 0,
    rows: Sequence[tuple[int, int]] = (),
    data: Sequence[bytes | memoryview] = (),
    *,
    codec: Codec = Codec.NONE,
    length: int | None = None,
) -> list[bytes | memoryview]:
    """A message as parts to be written one after the other.

    data -- as stored. length -- of the data before it was compressed.
    """
    table = np.array(rows, dtype="<i8").tobytes()
    stored = sum(len(part) for part in data)
    digest = xxhash.xxh3_64(table)
    for part in data:
        digest.update(part)
    head = HEAD.pack(
        kind,
        codec,
        len(rows),
        request,
        stored,
        stored if length is None else length,
        digest.intdigest(),
        0,
    )[:-_CHECKED]
    return [head + checksum(head).to_bytes(_CHECKED, "little"), table, *data]


def pack_json(kind: Kind, request: int, value: dict[str, Any]) -> list[bytes | memoryview]:
    raw = json.dumps(value, separators=(",", ":")).encode("ascii")
    if len(raw) > MAX_JSON:
        raise ValueError(f"{len(raw)} bytes of JSON, and {MAX_JSON} are allowed")
    return pack(kind, request, data=[raw])


class Reader:
    """Takes messages from `fill`, which fills a view or raises. Malformed for what is none."""

    def __init__(self, fill: Callable[[memoryview], None]) -> None:
        self._fill = fill
        self._decompressor: Decompressor | None = None

    def next(self) -> Message:
        head = bytearray(HEAD.size)
        self._fill(memoryview(head))
        if checksum(head[:-_CHECKED]) != int.from_bytes(head[-_CHECKED:], "little"):
            raise Malformed("the head of a message does not match its checksum")
        number, code, count, request, stored, length, digest, _ = HEAD.unpack(head)
        kind, codec = _KINDS.get(number), _CODECS.get(code)
        if kind is None or codec is None:
            raise Malformed(f"a message of kind {number} and codec {code}")
        if wrong := _wrong(kind, codec, count, stored, length):
            raise Malformed(f"a message {kind.name} {wrong}")
        raw = memoryview(bytearray(count * _ROW + stored))
        self._fill(raw)
        if checksum(raw) != digest:
            raise Malformed(f"a message {kind.name} does not match its checksum")
        rows = np.frombuffer(raw[: count * _ROW], dtype="<i8").astype(np.int64).reshape(-1, 2)
        data: memoryview | bytes = raw[count * _ROW :]
        if codec is Codec.ZSTD:
            data = self._decompressed(raw[count * _ROW :], length)
        if count and (rows[:, 0].min() < 0 or rows[:, 1].min() <= 0):
            raise Malformed(f"a message {kind.name} has an extent with no place")
        if kind in _BOUNDED and (
            int(rows[:, 1].max()) > MAX_DATA or int(rows[:, 1].sum()) > MAX_DATA
        ):
            raise Malformed(f"a message {kind.name} has extents of more than {MAX_DATA} bytes")
        if kind is Kind.WRITE and int(rows[:, 1].sum()) != length:
            raise Malformed("a message WRITE has not the data of its extents")
        return Message(kind, request, rows if count else _NO_ROWS, data)

    def _decompressed(self, packed: memoryview, length: int) -> bytes:
        self._decompressor = self._decompressor or Decompressor()
        try:
            return self._decompressor.decompress(packed, length, 0)
        except DeltaInvalid as error:
            raise Malformed(f"a message whose data is no zstd frame of {length} bytes") from error


def _wrong(kind: Kind, codec: Codec, count: int, stored: int, length: int) -> str:
    """What a message may not say so: a clause, "" if it may."""
    if bool(count) is not (kind in _ROWS) or count > MAX_ROWS:
        return f"has {count} extents"
    most = MAX_DATA if kind in _BINARY else 0 if kind in _EMPTY else MAX_JSON
    if stored > most or length > most:
        return f"has {max(stored, length)} bytes, and {most} are allowed"
    if codec is not Codec.NONE:
        return "" if kind in _DATA and 0 < stored < length else "is compressed"
    return "has two lengths" if stored != length else ""
