"""The one currency above `bpf/`: half-open byte ranges."""

from __future__ import annotations

from collections.abc import Sequence
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


def from_pairs(pairs: Sequence[tuple[int, int]]) -> ExtentArray:
    """Any (start, length) pairs as sorted, disjoint, coalesced extents; empty ones are dropped."""
    return _coalesced(np.array(pairs, dtype=np.int64).reshape(-1, 2))


def union(one: ExtentArray, other: ExtentArray) -> ExtentArray:
    """All bytes of both."""
    return _coalesced(np.concatenate([one, other]))


def intersect(one: ExtentArray, other: ExtentArray) -> bool:
    """Whether any byte is in both."""
    if not len(one) or not len(other):
        return False
    # The last extent of `other` that begins before each of `one` ends: does it reach into it?
    last = np.searchsorted(other[:, 0], one[:, 0] + one[:, 1], side="left") - 1
    reach = other[last, 0] + other[last, 1]
    return bool(((last >= 0) & (reach > one[:, 0])).any())


def _coalesced(given: ExtentArray) -> ExtentArray:
    given = given[given[:, 1] > 0]
    if not len(given):
        return empty()
    given = given[np.argsort(given[:, 0], kind="stable")]
    start, reach = given[:, 0], np.maximum.accumulate(given[:, 0] + given[:, 1])
    first = np.r_[True, start[1:] > reach[:-1]]  # begins beyond all that came before
    last = np.r_[first[1:], True]
    return np.stack([start[first], reach[last] - start[first]], axis=1)


def total(extents: ExtentArray) -> int:
    """Bytes in all of them."""
    return int(extents[:, 1].sum())


def to_list(extents: ExtentArray) -> list[Extent]:
    return [Extent(int(start), int(length)) for start, length in extents]
