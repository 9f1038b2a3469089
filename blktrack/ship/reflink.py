"""Bringing a pack's data into a replica by sharing its blocks, on file systems that can."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np

from blktrack import linux
from blktrack.extent import Extent
from blktrack.ship.endpoint import EndError, FileEnd
from blktrack.ship.pack import ZERO, Index

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


def share(source: FileEnd, replica: FileEnd, index: Index, stop: threading.Event) -> Index:
    """Share what can be shared of the data in a pack; the rows that are left to be copied.

    That is small extents, the ends of others that are no whole blocks, all where there are no
    reflinks, and what was not come to when `stop` was set. Durable after flush(). EndError.
    """
    unit = max(os.fstatvfs(replica.fileno()).f_bsize, linux.PAGE)
    start, end, shift = index[:, 0], index[:, 0] + index[:, 1], index[:, 2] - index[:, 0]
    first, last = -(-start // unit) * unit, end // unit * unit
    fits = (index[:, 2] != ZERO) & (shift % unit == 0)
    large = fits & (last - first >= max(LEAST, unit))
    done = 0
    for begin, until, away in np.stack([first, last, shift], axis=1)[large].tolist():
        if stop.is_set() or not _share(source, replica, begin, until, away):
            break
        done += 1
    if not done:
        return index
    shared = np.flatnonzero(large)[:done]
    heads = np.stack([start, first - start, index[:, 2]], axis=1)[shared]
    tails = np.stack([last, end - last, last + shift], axis=1)[shared]
    left = np.concatenate([np.delete(index, shared, axis=0), heads, tails])
    left = left[left[:, 1] > 0]
    return left[np.argsort(left[:, 0], kind="stable")]


def _share(source: FileEnd, replica: FileEnd, begin: int, stop: int, away: int) -> bool:
    """False if it cannot be done; part of it may have been.

    away -- how much further on it lies in the source.
    """
    while begin < stop:
        length = min(stop - begin, _PIECE)
        try:
            linux.clone_range(source.fileno(), begin + away, length, replica.fileno(), begin)
        except OSError as error:
            if error.errno in _CANNOT:
                return False
            place = Extent(begin, length)
            raise EndError(replica.path, "share blocks in", place, error) from error
        begin += length
    return True
