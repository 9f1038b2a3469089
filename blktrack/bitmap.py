"""Bits and extents: which granules of a device are meant.

A bitmap is an array of 64-bit words, bit `i` of word `w` standing for granule `64 * w + i`. All
functions work on numpy views, so the words may as well be a kernel map or a file in memory. Their
cost follows the words that are set plus one sequential scan; a device of 2^28 granules is 32 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from blktrack.extent import ExtentArray, empty

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]
BITS = 64
ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

# Scans go through slices of this many words, so that temporaries stay small and in the cache.
_SLICE = 1 << 15


def words_for(bits: int) -> int:
    return -(-bits // BITS)


def granules_for(size: int, granularity: int) -> int:
    return -(-size // granularity)


def nonzero(words: Words) -> Indices:
    """Indices of the words that are not zero. Other writers may set bits meanwhile."""
    found = []
    for start in range(0, len(words), _SLICE):
        # Booleans are a copy, which stays as it is, and are searched several times faster.
        part = (words[start : start + _SLICE] != 0).nonzero()[0]
        if len(part):
            found.append(part + start)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def any_set(words: Words) -> bool:
    return any(words[i : i + _SLICE].any() for i in range(0, len(words), _SLICE))


def count(words: Words, index: Indices | None = None) -> int:
    """Bits set. Here and below `index`, if given, holds the numbers of the words that are set."""
    found = words[nonzero(words) if index is None else index]
    return int(np.unpackbits(found.view(np.uint8)).sum(dtype=np.int64)) if len(found) else 0


def or_into(target: Words, source: Words, index: Indices | None = None) -> None:
    """Add the bits of `source` to `target`; only words that are set are written."""
    if index is None:
        index = nonzero(source)
    target[index] |= source[index]


def _ends(first: int, count: int) -> tuple[int, int, np.uint64, np.uint64]:
    """The first and last word of a range of bits, and the masks of its bits in them."""
    last = first + count - 1
    head = np.uint64((1 << 64) - (1 << (first % BITS)))
    tail = np.uint64((1 << (last % BITS + 1)) - 1)
    return first // BITS, last // BITS, head, tail


def set_range(words: Words, first: int, count: int) -> None:
    """Set `count` bits from bit `first` on."""
    if count <= 0:
        return
    low, high, head, tail = _ends(first, count)
    if low == high:
        words[low] |= head & tail
        return
    words[low] |= head
    words[low + 1 : high] = ALL
    words[high] |= tail


def clear_range(words: Words, first: int, count: int) -> None:
    """Clear `count` bits from bit `first` on."""
    if count <= 0:
        return
    low, high, head, tail = _ends(first, count)
    if low == high:
        words[low] &= ~(head & tail)
        return
    words[low] &= ~head
    words[low + 1 : high] = 0
    words[high] &= ~tail


def set_bits(words: Words, bits: NDArray[np.int64]) -> None:
    """Set the bits of these numbers, in any order, repeated or not."""
    np.bitwise_or.at(words, bits // BITS, np.uint64(1) << (bits % BITS).astype(np.uint64))


def bits(words: Words) -> NDArray[np.int64]:
    """The numbers of the set bits, ascending."""
    index = nonzero(words)
    found = list(_places(words[index], index))
    return np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)


def _places(words: Words, index: Indices) -> Iterator[Indices]:
    """The numbers of the set bits of `words`, which lie at `index`: the lowest of each, the next …

    As many turns as the fullest word has bits, each over the words that have one left.
    """
    base = index * BITS
    while len(words):
        lowest = words & (~words + np.uint64(1))
        # A power of two is exact as a float, and its exponent is the number of the bit.
        yield base + ((lowest.astype(np.float64).view(np.int64) >> 52) - 1023)
        words = words ^ lowest
        left = words != 0
        words, base = words[left], base[left]


def _runs(words: Words, index: Indices) -> tuple[Indices, Indices]:
    """First and one-past-last bit of every run of set bits."""
    if not len(index):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    full = words[index] == ALL
    starts = index[full] * BITS
    parts_first, parts_end = [starts], [starts + BITS]
    mixed = index[~full]
    one = np.uint64(1)
    for at in range(0, len(mixed), _SLICE):
        some = mixed[at : at + _SLICE]
        values = words[some]
        # A run begins with a bit whose lower neighbour is clear, and ends with one whose higher is.
        parts_first += _places(values & ~(values << one), some)
        parts_end += [last + 1 for last in _places(values & ~(values >> one), some)]
    first = np.sort(np.concatenate(parts_first))
    end = np.sort(np.concatenate(parts_end))
    # Runs were cut at word edges: one that begins where the one before ends continues it.
    joined = first[1:] == end[:-1]
    return first[np.r_[True, ~joined]], end[np.r_[~joined, True]]


def extents(words: Words, granularity: int, size: int, index: Indices | None = None) -> ExtentArray:
    """The set bits as coalesced extents in bytes, the last one clipped to `size`."""
    first, end = _runs(words, nonzero(words) if index is None else index)
    if not len(first):
        return empty()
    start = first * granularity
    stop = np.minimum(end * granularity, size)
    return np.stack([start, stop - start], axis=1).astype(np.int64)


def clear_extents(words: Words, granularity: int, size: int, done: ExtentArray) -> None:
    """Clear the granules wholly inside `done`; one that `size` cuts off counts as whole."""
    for start, length in done.tolist():
        end = start + length
        first = -(-start // granularity)
        last = granules_for(size, granularity) if end >= size else end // granularity
        clear_range(words, first, last - first)
