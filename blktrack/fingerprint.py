"""Has a device been written while nobody looked? Told from samples and from the kernel's counters.

Whoever uses a device writes to its ends, where super blocks, labels and partition tables are, and
again where it wrote last: journals, logs, allocation tables. These places are read and digested,
and a few evenly spread ones. A single block changed in the middle, by hand, can escape them; within
a boot the kernel's count of sectors written does not let it, but for a partition written through
its whole disk, which counts such writes as its own alone.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from blktrack import extent
from blktrack.extent import ExtentArray
from blktrack.linux import Buffer
from blktrack.sysfs import BlockDevice

_EDGE = 1 << 20  # bytes of either end
_SAMPLES = 256  # blocks of the last changes, and as many evenly spread
_BLOCK = 4096


def places(size: int, recent: ExtentArray) -> list[list[int]]:
    """What to look at of a device of `size` bytes, as [start, length]; `recent` changed last."""
    last = (size - 1) // _BLOCK * _BLOCK
    chosen = recent[:: max(len(recent) // _SAMPLES, 1), 0]
    spread = np.linspace(0, last, _SAMPLES).astype(np.int64)
    blocks = np.unique(np.concatenate([chosen, spread]) // _BLOCK * _BLOCK)
    tail = max(size - _EDGE, 0) // _BLOCK * _BLOCK
    pairs = [(0, min(_EDGE, size)), (tail, size - tail)]
    pairs += [(at, min(_BLOCK, size - at)) for at in blocks.tolist()]
    found: list[list[int]] = extent.from_pairs(pairs).tolist()
    return found


def take(fd: int, where: list[list[int]]) -> str:
    """A digest of these places. `fd` is open for direct I/O. OSError if one cannot be read."""
    digest = hashlib.blake2b(digest_size=20)
    buffer = Buffer(_EDGE)
    for start, length in where:
        while length:
            piece = min(length, _EDGE)
            view = buffer.view[:piece]
            if os.preadv(fd, [view], start) != piece:
                raise OSError(f"a short read at {start}")
            digest.update(view)
            start, length = start + piece, length - piece
    return digest.hexdigest()


def sectors_written(device: BlockDevice) -> int:
    """Sectors written and discarded since the boot (Documentation/block/stat.rst)."""
    fields = [int(word) for word in (device.sys / "stat").read_text().split()]
    return fields[6] + (fields[13] if len(fields) > 13 else 0)
