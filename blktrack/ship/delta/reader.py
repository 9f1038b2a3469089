"""Takes a delta apart that anybody may have made, within bounded memory.

Nothing is allocated by a length from the stream before it was held against its limit, and nothing
is handed out before its checksum holds. What is handed out is still only a part of a delta: it
leads to a point only with the trailer, whose digest tells frames that were lost, repeated or mixed
up. None of this keeps out who forges checksums: that is for the connection to do (ssh).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from blktrack import linux
from blktrack.linux import Buffer
from blktrack.ship.delta.codec import Decompressor
from blktrack.ship.delta.errors import DeltaDamaged, DeltaForeign, DeltaInvalid, DeltaTruncated
from blktrack.ship.delta.format import (
    DIGEST_SIZE,
    HEAD,
    MAGIC,
    MAX_FRAME,
    PREAMBLE,
    Codec,
    Head,
    Kind,
    checksum,
    unpack_preamble,
)
from blktrack.ship.delta.meta import Counts, Header, Trailer
from blktrack.ship.delta.pipe import Source, read_full


class Frame(NamedTuple):
    """One extent, in bytes, within the size of the source, and never empty."""

    kind: Kind  # DATA, ZERO or DISCARD
    start: int
    length: int
    data: memoryview | None  # of DATA; it lies in memory as `start` lies in its page

    @property
    def end(self) -> int:
        return self.start + self.length


class DeltaReader:
    """An iterator over the frames of a delta, to be applied in this order; then its trailer.

    `data` of a frame is good until the next frame is asked for. Any DeltaError ends the delta, for
    good. The reader takes no byte beyond the digest, so that a file object which keeps what it
    gives out has kept exactly the delta, and another one may follow in the same pipe; expect_end()
    is for who wants none.
    """

    def __init__(self, file: Source) -> None:
        """Reads the header. The file may be a pipe; a buffer helps where frames are small."""
        self._in = _Input(file)
        self.header = self._read_header()
        self._counts = Counts()
        self._trailer: Trailer | None = None
        self._failed = False
        self._head = bytearray(HEAD.size)
        self._buffer: Buffer | None = None
        self._packed: Buffer | None = None
        self._decompressor: Decompressor | None = None

    @property
    def offset(self) -> int:
        """Bytes of the stream read so far."""
        return self._in.offset

    @property
    def trailer(self) -> Trailer:
        """Where the whole delta leads; only once every frame was taken and the digest held."""
        if self._trailer is None:
            raise ValueError("the delta has not been read to its end")
        return self._trailer

    def expect_end(self) -> None:
        """DeltaInvalid if something follows the trailer. Waits until the sender closes its end."""
        if self._trailer is None:
            raise ValueError("the delta has not been read to its end")
        if self._in.has_more():
            raise DeltaInvalid(f"something follows its trailer, at byte {self.offset}")

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        if self._failed:
            raise ValueError("the delta was refused before")
        if self._trailer is not None:
            raise StopIteration
        try:
            offset = self.offset
            self._in.fill(memoryview(self._head), "a frame's head")
            head = Head.unpack(self._head, self.header.size, offset)
            if head.kind is not Kind.END:
                return self._frame(head)
            self._trailer = self._read_trailer(head)
        except BaseException:  # a signal too: nobody knows where in the stream it came
            self._failed = True
            raise
        raise StopIteration

    def _frame(self, head: Head) -> Frame:
        self._counts.add(head)
        kind, codec, stored, start, length, _ = head
        if kind is not Kind.DATA:
            self._check(b"", head)
            return Frame(kind, start, length, None)
        if self._buffer is None:
            self._buffer = Buffer(MAX_FRAME + linux.PAGE)
        shift = start % linux.PAGE
        data = self._buffer.view[shift : shift + length]
        if codec is Codec.NONE:
            self._payload(data, head)
        else:
            self._packed = self._packed or Buffer(MAX_FRAME)
            packed = self._packed.view[:stored]
            self._payload(packed, head)
            self._decompressor = self._decompressor or Decompressor()
            data[:] = self._decompressor.decompress(packed, length, self.offset - stored)
        return Frame(kind, start, length, data)

    def _payload(self, view: memoryview, head: Head) -> None:
        self._in.fill(view, "a frame's data" if head.length else "its trailer")
        self._check(view, head)

    def _check(self, payload: bytes | memoryview, head: Head) -> None:
        if checksum(payload) != head.checksum:
            offset = self.offset - len(payload)
            raise DeltaDamaged(f"the payload at byte {offset} does not match its checksum")

    def _read_header(self) -> Header:
        raw = bytearray(PREAMBLE.size)
        magic = memoryview(raw)[: len(MAGIC)]
        got = self._in.read(magic)
        if got and magic[:got] != MAGIC[:got]:
            raise DeltaForeign(bytes(magic[:got]))
        if got < len(magic):
            raise DeltaTruncated(got, "its preamble")
        self._in.fill(memoryview(raw)[len(MAGIC) :], "its preamble")
        length, header_sum = unpack_preamble(raw)
        header = bytearray(length)
        self._in.fill(memoryview(header), "its header")
        if checksum(header) != header_sum:
            raise DeltaDamaged("its header does not match its checksum")
        return Header.decode(bytes(header))

    def _read_trailer(self, head: Head) -> Trailer:
        raw = bytearray(head.stored)
        self._payload(memoryview(raw), head)
        expected = self._in.digest()
        found = bytearray(DIGEST_SIZE)
        self._in.fill(memoryview(found), "its digest")
        if found != expected:
            raise DeltaDamaged("its digest does not hold: frames were lost, repeated or mixed up")
        trailer = Trailer.decode(bytes(raw))
        if trailer.counts != self._counts:
            raise DeltaInvalid(f"its trailer counts {trailer.counts}, and it has {self._counts}")
        return trailer


class _Input:
    """Reads exactly what is asked for, counting and digesting it."""

    def __init__(self, file: Source) -> None:
        self.offset = 0
        self._file = file
        self._digest = xxhash.xxh3_128()

    def read(self, view: memoryview) -> int:
        """Fill `view`; the bytes read, fewer only at the end of the stream."""
        got = read_full(self._file, view)
        self.offset += got
        self._digest.update(view[:got] if got < len(view) else view)
        return got

    def fill(self, view: memoryview, what: str) -> None:
        """Fill `view`; DeltaTruncated if the stream ends within `what`."""
        if self.read(view) < len(view):
            raise DeltaTruncated(self.offset, what)

    def digest(self) -> bytes:
        """Of everything read so far."""
        return self._digest.digest()

    def has_more(self) -> bool:
        return read_full(self._file, memoryview(bytearray(1))) > 0
