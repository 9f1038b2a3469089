"""Room that a pack takes for ranges that were overridden since: given back.

An increment that is gone on with over a link that breaks often takes what changed in between once
more each time. It would grow far beyond what it leads to, until its file system is full.
"""

from __future__ import annotations

import contextlib

import numpy as np

from blktrack import extent, linux
from blktrack.extent import ExtentArray
from blktrack.linux import PAGE
from blktrack.ship.pack import ZERO, Index, resolve

_WORTH = 1 << 20  # bytes; fewer are left where they are


def give_back(fd: int, rows: Index, packed: int) -> None:
    """Punch holes where no row counts any more, if there is much, and it can be done.

    rows -- as they were written, and durable, as is their data: those that override others too.
    packed -- length of the pack.
    """
    unused = unused_in(resolve(rows), packed)
    if extent.total(unused) < _WORTH:
        return
    with contextlib.suppress(OSError):  # a file system that cannot
        for start, length in unused.tolist():
            linux.punch_hole(fd, start, length)


def unused_in(index: Index, packed: int) -> ExtentArray:
    """Pages of a pack that a resolved index needs nothing of."""
    data = index[index[:, 2] != ZERO]
    data = data[np.argsort(data[:, 2])]
    begins = data[:, 2] // PAGE * PAGE
    ends = -(-(data[:, 2] + data[:, 1]) // PAGE) * PAGE
    # Places of rows that were written apart are apart: no end is behind a later one's.
    starts = np.r_[0, ends].astype(np.int64)
    lengths = np.r_[begins, packed].astype(np.int64) - starts
    found: ExtentArray = np.stack([starts, lengths], axis=1)[lengths > 0]
    return found
