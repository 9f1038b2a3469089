"""Writes a delta to a pipe or file while it is made."""

from __future__ import annotations

import errno
import os
import threading

import xxhash

from blktrack.point import Point
from blktrack.ship.delta.codec import Compressor
from blktrack.ship.delta.errors import DeltaBroken
from blktrack.ship.delta.format import MAX_FRAME, Codec, Head, Kind, pack_preamble
from blktrack.ship.delta.meta import Counts, Header, Trailer
from blktrack.ship.delta.pipe import Sink, write_all
from blktrack.units import KIB

_GATHER = 256 * KIB  # heads and small payloads wait until they are so many bytes
_LARGE = 32 * KIB  # payloads of so many bytes are not copied there


class DeltaWriter:
    """Frames in, bytes out; a reader applies them in the order of the calls.

    Without end() the stream has no trailer and is never applied: to give up is to stop calling.
    Threads may call data(), zero() and discard() side by side, compressing in parallel, as long as
    their extents do not meet. DeltaBroken if the file fails, and from then on at every call.
    """

    def __init__(self, file: Sink, header: Header, *, level: int | None = None) -> None:
        """Writes the header. `level` is zstd's, None for no compression.

        file -- unbuffered is best: what is small is gathered here.
        """
        self.header = header
        self._out = _Output(file)
        self._compressor = None if level is None else Compressor(level)
        self._lock = threading.Lock()
        self._counts = Counts()
        self._ended = False
        raw = header.encode()
        self._out.put(pack_preamble(raw), raw)
        self._out.flush()

    @property
    def written(self) -> int:
        """Bytes of the stream so far, those that still wait here included."""
        return self._out.written

    def data(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """The bytes from `start` on become `data`, which may be reused after the call."""
        with memoryview(data) as given, given.cast("B") as view:
            self._check(start, len(view))
            for at in range(0, len(view), MAX_FRAME):
                with view[at : at + MAX_FRAME] as piece:
                    self._data_frame(start + at, piece)

    def zero(self, start: int, length: int) -> None:
        """The extent reads as zeroes."""
        self._check(start, length)
        self._put(Head.over(b"", Kind.ZERO, start, length), b"")

    def discard(self, start: int, length: int) -> None:
        """The extent reads as zeroes, and the source gave its space back."""
        self._check(start, length)
        self._put(Head.over(b"", Kind.DISCARD, start, length), b"")

    def flush(self) -> None:
        """Pass on what waits here: before a pause, for instance."""
        with self._lock:
            self._out.flush()

    def end(self, point: Point, *, rounds: int = 1) -> Trailer:
        """Write the trailer: every frame applied in order is the source at `point`."""
        with self._lock:
            self._check_open()
            trailer = Trailer(point, rounds, self._counts)
            raw = trailer.encode()
            self._ended = True
            self._out.put(Head.over(raw, Kind.END).pack(), raw)
            self._out.end()
        return trailer

    def _data_frame(self, start: int, piece: memoryview) -> None:
        packed = self._compressor.compress(piece) if self._compressor else None
        if packed is None:
            self._put(Head.over(piece, Kind.DATA, start, len(piece)), piece)
        else:
            self._put(Head.over(packed, Kind.DATA, start, len(piece), Codec.ZSTD), packed)

    def _put(self, head: Head, payload: bytes | memoryview) -> None:
        packed = head.pack()
        with self._lock:
            self._check_open()
            self._counts.add(head)
            self._out.put(packed, payload)

    def _check(self, start: int, length: int) -> None:
        if start < 0 or length <= 0 or start + length > self.header.size:
            raise ValueError(f"{start}+{length} is not within {self.header.size} bytes")

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError("the delta has ended")


class _Output:
    """Gathers what is small, digests everything and writes it out in full."""

    def __init__(self, file: Sink) -> None:
        self.written = 0
        self._file = file
        self._waiting = bytearray()
        self._digest = xxhash.xxh3_128()
        self._failed: int | None = None  # errno

    def put(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self.written += len(part)
            if len(part) >= _LARGE:
                self.flush()
                self._write(part)
            else:
                self._waiting += part
        if len(self._waiting) >= _GATHER:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, bytearray()
        self._write(waiting)

    def end(self) -> None:
        """The digest of all before it, and nothing after it."""
        self.flush()
        digest = self._digest.digest()
        self.written += len(digest)
        self._write(digest)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        if self._failed is not None:
            raise DeltaBroken("write", OSError(self._failed, os.strerror(self._failed)))
        self._digest.update(data)
        try:
            write_all(self._file, data)
        except BaseException as error:  # a signal too: nobody knows how much of it was written
            self._failed = error.errno if isinstance(error, DeltaBroken) else errno.EINTR
            raise
