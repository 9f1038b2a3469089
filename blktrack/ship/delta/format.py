"""The bytes of a delta: preamble, frame heads, their limits and checksums.

docs/delta-format.md describes them. All integers are little-endian and unsigned.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple, Self

import xxhash

from blktrack.ship.delta.errors import DeltaDamaged, DeltaInvalid, DeltaNewer
from blktrack.units import KIB, MIB

# As that of PNG: a first byte that is no text, and line ends that a text mode would change.
MAGIC = b"\x89BLKD\r\n\x1a"
VERSION = 1

MAX_FRAME = 4 * MIB  # bytes of the extent of a data frame
MAX_JSON = 64 * KIB  # bytes of the header, and of the trailer
MAX_WINDOW = 8 * MIB  # that decompressing a frame may need

DIGEST_SIZE = 16

# Magic, version, flags, length and checksum of the header, checksum of all of these.
PREAMBLE = struct.Struct("<8sHHIQQ")
# Kind, codec, flags, payload bytes, start, length, checksum of the payload, of all of these.
HEAD = struct.Struct("<BBHIQQQQ")
_CHECKED = 8  # bytes at the end of both that hold the checksum of the bytes before


class Kind(IntEnum):
    """What a frame does to its extent."""

    DATA = 1  # its bytes become the payload
    ZERO = 2  # they read as zeroes
    DISCARD = 3  # they read as zeroes, and their space is not needed
    END = 255  # no extent: the payload is the trailer


class Codec(IntEnum):
    """How a payload is stored."""

    NONE = 0
    ZSTD = 1


def checksum(data: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def _is_whole(raw: bytes | bytearray) -> bool:
    return checksum(raw[:-_CHECKED]) == int.from_bytes(raw[-_CHECKED:], "little")


def _seal(packed: bytes) -> bytes:
    checked = packed[:-_CHECKED]
    return checked + checksum(checked).to_bytes(_CHECKED, "little")


def pack_preamble(header: bytes) -> bytes:
    return _seal(PREAMBLE.pack(MAGIC, VERSION, 0, len(header), checksum(header), 0))


def unpack_preamble(raw: bytes | bytearray) -> tuple[int, int]:
    """Length and checksum of the header. The magic is the caller's to check."""
    _, version, flags, length, header_sum, _ = PREAMBLE.unpack(raw)
    if not _is_whole(raw):
        raise DeltaDamaged("its preamble does not match its checksum")
    if version != VERSION:
        raise DeltaNewer(f"format version {version}, and this blktrack reads version {VERSION}")
    if flags:
        raise DeltaNewer(f"flags {flags:#06x} in its preamble")
    if not 0 < length <= MAX_JSON:
        raise DeltaInvalid(f"its header has {length} bytes, and 1 to {MAX_JSON} are allowed")
    return length, header_sum


class Head(NamedTuple):
    """What stands before each payload. Sizes are in bytes."""

    kind: Kind
    codec: Codec
    stored: int  # bytes of the payload
    start: int
    length: int
    checksum: int  # of the payload as it is stored

    @classmethod
    def over(
        cls,
        payload: bytes | memoryview,
        kind: Kind,
        start: int = 0,
        length: int = 0,
        codec: Codec = Codec.NONE,
    ) -> Self:
        return cls(kind, codec, len(payload), start, length, checksum(payload))

    def pack(self) -> bytes:
        kind, codec, stored, start, length, payload_sum = self
        return _seal(HEAD.pack(kind, codec, 0, stored, start, length, payload_sum, 0))

    @classmethod
    def unpack(cls, raw: bytes | bytearray, size: int, offset: int) -> Self:
        """A head that may be acted upon: known in all parts, within limits and within `size`.

        offset -- where in the stream it stands, for messages.
        """
        if not _is_whole(raw):
            raise DeltaDamaged(f"the frame head at byte {offset} does not match its checksum")
        kind, codec, flags, stored, start, length, payload_sum, _ = HEAD.unpack(raw)
        if kind not in _KINDS:
            raise DeltaNewer(f"a frame of kind {kind} at byte {offset}")
        if codec not in _CODECS:
            raise DeltaNewer(f"a frame of codec {codec} at byte {offset}")
        if flags:
            raise DeltaNewer(f"flags {flags:#06x} in the frame at byte {offset}")
        head = cls(_KINDS[kind], _CODECS[codec], stored, start, length, payload_sum)
        if wrong := head._wrong(size):
            raise DeltaInvalid(f"the frame at byte {offset} {wrong}")
        return head

    def _wrong(self, size: int) -> str:
        """What a delta of a source of `size` bytes may not say so: a clause, "" if it may."""
        kind, codec, stored, start, length, _ = self
        if kind is Kind.END:
            if start or length or codec:
                return "is a trailer and has an extent or a codec"
            if not 0 < stored <= MAX_JSON:
                return f"is a trailer of {stored} bytes, and 1 to {MAX_JSON} are allowed"
            return ""
        if not length:
            return "has an empty extent"
        if start + length > size:
            return f"has the extent {start}+{length}, and the source has {size} bytes"
        if kind is not Kind.DATA:
            return "has no data, and a payload or a codec" if stored or codec else ""
        if length > MAX_FRAME:
            return f"has data for {length} bytes, and {MAX_FRAME} are allowed"
        if codec is Codec.NONE:
            return f"has {stored} bytes for an extent of {length}" if stored != length else ""
        return "" if 0 < stored < length else f"is compressed from {length} to {stored} bytes"


_KINDS = {int(kind): kind for kind in Kind}
_CODECS = {int(codec): codec for codec in Codec}
