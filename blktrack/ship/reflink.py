"""Bringing extents of one file into another by sharing their blocks, on file systems that can."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np

from blktrack import linux
from blktrack.extent import Extent, ExtentArray, from_pairs
from blktrack.ship.endpoint import EndError, FileEnd

# Two file systems, one without reflinks or with other blocks, a swap file.
_CANNOT = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
    errno.ETXTBSY,
}
# Smaller extents are copied: that takes less time, 60 µs each against 200, and leaves the file in
# fewer pieces, which would make the next sharing slower still.
LEAST = 256 << 10
_PIECE = 1 << 30  # shared by one call


def share(
    source: FileEnd, replica: FileEnd, extents: ExtentArray, stop: threading.Event
) -> ExtentArray:
    """Share what can be shared of `extents`, holes included; what is left to be copied.

    That is small extents, the ends of others that are no whole blocks, all where there are no
    reflinks, and what was not come to when `stop` was set. Durable after flush(). EndError.
    """
    unit = max(os.fstatvfs(replica.fileno()).f_bsize, linux.PAGE)
    start, end = extents[:, 0], extents[:, 0] + extents[:, 1]
    first, last = -(-start // unit) * unit, end // unit * unit
    large = last - first >= max(LEAST, unit)
    done = 0
    rows = np.stack([first, last], axis=1)[large].tolist()
    for begin, until in rows:
        if stop.is_set() or not _share(source, replica, begin, until):
            break
        done += 1
    if not done:
        return extents
    shared = np.flatnonzero(large)[:done]
    kept = np.delete(extents, shared, axis=0)
    heads = np.stack([start, first - start], axis=1)[shared]
    tails = np.stack([last, end - last], axis=1)[shared]
    return from_pairs(np.concatenate([kept, heads, tails]).tolist())


def _share(source: FileEnd, replica: FileEnd, begin: int, stop: int) -> bool:
    """False if it cannot be done; part of it may have been."""
    while begin < stop:
        length = min(stop - begin, _PIECE)
        try:
            linux.clone_range(source.fileno(), begin, length, replica.fileno(), begin)
        except OSError as error:
            if error.errno in _CANNOT:
                return False
            place = Extent(begin, length)
            raise EndError(replica.path, "share blocks in", place, error) from error
        begin += length
    return True
