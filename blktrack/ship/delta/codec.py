"""Compression of single payloads, within bounded memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from blktrack.ship.delta.errors import DeltaInvalid
from blktrack.ship.delta.format import MAX_WINDOW

if TYPE_CHECKING:
    from zstandard import ZstdCompressor

_GAIN = 16  # less than this part of a payload saved is not worth the time of decompressing it


class Compressor:
    """zstd at one level. Threads may use it side by side."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._own = threading.local()  # a context is for one thread at a time

    def compress(self, data: memoryview) -> bytes | None:
        """`data` made smaller; None where that fails."""
        packed = self._context().compress(data)
        return packed if len(packed) < len(data) - len(data) // _GAIN else None

    def _context(self) -> ZstdCompressor:
        found: ZstdCompressor | None = getattr(self._own, "context", None)
        if found is None:
            from zstandard import ZstdCompressor

            found = self._own.context = ZstdCompressor(level=self._level, write_content_size=True)
        return found


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
