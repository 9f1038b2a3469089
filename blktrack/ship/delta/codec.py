"""Compression of single payloads, within bounded memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from blktrack.ship.delta.errors import DeltaInvalid
from blktrack.ship.delta.format import MAX_WINDOW

if TYPE_CHECKING:
    from zstandard import ZstdCompressor

_GAIN = 16  # less than this part of a payload saved is not worth the time of decompressing it
_IDLE = 8  # contexts kept for the next payload: a few MiB each, at level 12 and above 40 and more


class Compressor:
    """zstd. Threads may use it side by side."""

    def __init__(self, level: int | None = None) -> None:
        """`level` is what compress() uses where it is not told."""
        self._level = level
        self._lock = threading.Lock()
        self._idle: list[tuple[int, ZstdCompressor]] = []  # the one used last is the last

    def compress(self, data: memoryview, level: int | None = None) -> bytes | None:
        """`data` made smaller; None where that fails."""
        level = level if level is not None else self._level
        if level is None:
            raise ValueError("no level to compress at")
        context = self._take(level)
        packed = context.compress(data)
        with self._lock:
            self._idle.append((level, context))
            del self._idle[:-_IDLE]
        return packed if len(packed) < len(data) - len(data) // _GAIN else None

    def _take(self, level: int) -> ZstdCompressor:
        """A context is for one thread at a time, and for one level."""
        with self._lock:
            for at in reversed(range(len(self._idle))):
                if self._idle[at][0] == level:
                    return self._idle.pop(at)[1]
        from zstandard import ZstdCompressor

        return ZstdCompressor(level=level, write_content_size=True)


class Decompressor:
    """Takes back what Compressor made, and nothing that would need more memory."""

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard
        # zstd's own limit holds too, were its header read differently here and there.
        self._context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)

    def decompress(self, packed: memoryview, length: int, offset: int) -> bytes:
        """The `length` bytes, bounded by the caller, of the payload at `offset` of the stream."""
        zstd = self._zstd
        try:
            frame = zstd.get_frame_parameters(packed)
            # decompress() allocates what the frame says.
            if frame.content_size != length or frame.window_size > MAX_WINDOW:
                raise DeltaInvalid(
                    f"the payload at byte {offset} is not one zstd frame that declares {length} "
                    f"bytes and a window of {MAX_WINDOW} at most"
                )
            data = self._context.decompress(packed, allow_extra_data=False)
        except zstd.ZstdError:
            data = b""
        if len(data) != length:
            raise DeltaInvalid(f"the payload at byte {offset} cannot be decompressed")
        return data
