"""How a copy is cut into batches: what one thread reads into its buffer before it writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from blktrack.extent import ExtentArray, total
from blktrack.linux import PAGE

MAX_REQUESTS = 64  # of one batch: small ones are many, but progress and stopping must not wait
_ROWS = 4096  # extents turned into Python numbers at once


class Piece(NamedTuple):
    """One request: `length` bytes from `start`, at `at` in the buffer (as `start` in its page)."""

    start: int
    length: int
    at: int


Batch = list[Piece]


def batches(extents: ExtentArray, chunk: int) -> Iterator[Batch]:
    """Every extent once, in order, cut at multiples of `chunk`; a batch fits a buffer that big."""
    batch: Batch = []
    used = 0
    for row in range(0, len(extents), _ROWS):
        for start, length in extents[row : row + _ROWS].tolist():
            end = start + length
            while start < end:
                stop = min(end, (start // chunk + 1) * chunk)
                shift = start % PAGE
                room = -(-(shift + stop - start) // PAGE) * PAGE
                if used + room > chunk or len(batch) == MAX_REQUESTS:
                    yield batch
                    batch, used = [], 0
                batch.append(Piece(start, stop - start, used + shift))
                used += room
                start = stop
    if batch:
        yield batch


def chunk_for(extents: ExtentArray, most: int, threads: int, limit: int | None) -> int:
    """The batch size: a power of two up to `most`, such that all threads get a share of the work
    and that a limited copy reads several times a second."""
    wanted = max(total(extents) // (4 * threads), 256 << 10)
    if limit is not None:
        wanted = min(wanted, limit // 8)
    return min(most, max(64 << 10, 1 << max(wanted, 1).bit_length() - 1))
