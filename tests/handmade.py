"""Messages of the wire made by hand, right or wrong, by docs/wire.md and nothing of the product."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence

from tests.second_reader import xxh64

HEAD = "<BBHIIIQQ"
HEAD_SIZE = 32
MOST_DATA, MOST_JSON, MOST_ROWS = 4 << 20, 64 << 10, 1024

OPEN, ROOM, BEGIN, STAGE, WRITE, ZERO = 1, 2, 3, 4, 5, 6
FLUSH, COMPARE, SEAL, APPLY, COMMIT, PING = 7, 8, 9, 10, 11, 12
DONE, FAILED, DIGESTS, PROGRESS, ALIVE = 64, 65, 66, 67, 68
KINDS = (OPEN, ROOM, BEGIN, STAGE, WRITE, ZERO, FLUSH, COMPARE, SEAL, APPLY, COMMIT, PING)
ANSWERS = (DONE, FAILED, DIGESTS, PROGRESS, ALIVE)

EXTREMES = [0, 1, 15, 16, 1024, 1025, 65535, 65536, 65537, 2**22, 2**22 + 1, 2**31, 2**32 - 1]
WIDE = [*EXTREMES, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 4096]


def head(
    kind: int,
    *,
    codec: int = 0,
    count: int = 0,
    request: int = 0,
    stored: int = 0,
    length: int | None = None,
    follows: bytes = b"",
) -> bytes:
    """A head with right checksums, whatever it says."""
    length = stored if length is None else length
    raw = struct.pack(HEAD[:-1], kind, codec, count, request, stored, length, xxh64(follows))
    return raw + struct.pack("<Q", xxh64(raw))


def table(rows: Sequence[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack("<QQ", start % 2**64, length % 2**64) for start, length in rows)


def message(
    kind: int,
    request: int = 0,
    rows: Sequence[tuple[int, int]] = (),
    data: bytes = b"",
    *,
    codec: int = 0,
    length: int | None = None,
) -> bytes:
    follows = table(rows) + data
    made = head(
        kind,
        codec=codec,
        count=len(rows),
        request=request,
        stored=len(data),
        length=length,
        follows=follows,
    )
    return made + follows


def spoken(kind: int, request: int, value: object) -> bytes:
    return message(kind, request, data=json.dumps(value).encode())


def parsed(stream: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, request and data of each message of a stream from a keeper."""
    at = 0
    while at < len(stream):
        raw = stream[at : at + HEAD_SIZE]
        kind, codec, count, request, stored, length, digest, own = struct.unpack(HEAD, raw)
        assert own == xxh64(raw[:-8])
        assert (codec, count, stored) == (0, 0, length), "a keeper compresses nothing"
        data = stream[at + HEAD_SIZE : at + HEAD_SIZE + stored]
        assert len(data) == stored and digest == xxh64(data)
        yield kind, request, data
        at += HEAD_SIZE + stored
