"""The one currency above `bpf/`: half-open byte ranges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Shape (n, 2): start and length in bytes per row; sorted, disjoint, not touching.
ExtentArray = NDArray[np.int64]


class Extent(NamedTuple):
    """`length` bytes from byte `start` of a device."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    def __str__(self) -> str:
        return f"{self.start}+{self.length}"


def empty() -> ExtentArray:
    return np.empty((0, 2), dtype=np.int64)


def from_pairs(pairs: list[tuple[int, int]]) -> ExtentArray:
    """Any (start, length) pairs as sorted, disjoint, coalesced extents; empty ones are dropped."""
    kept = sorted((start, length) for start, length in pairs if length > 0)
    merged: list[list[int]] = []
    for start, length in kept:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], start + length)
        else:
            merged.append([start, start + length])
    if not merged:
        return empty()
    ends = np.array(merged, dtype=np.int64)
    ends[:, 1] -= ends[:, 0]
    return ends


def total(extents: ExtentArray) -> int:
    """Bytes in all of them."""
    return int(extents[:, 1].sum())


def to_list(extents: ExtentArray) -> list[Extent]:
    return [Extent(int(start), int(length)) for start, length in extents]
