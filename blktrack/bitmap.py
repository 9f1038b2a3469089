"""Bits and extents: which granules of a device are meant.

A bitmap is an array of 64-bit words, bit `i` of word `w` standing for granule `64 * w + i`. All
functions work on numpy views, so the words may as well be a kernel map or a file in memory. Their
cost follows the words that are set plus one sequential scan; a device of 2^28 granules is 32 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from blktrack.extent import ExtentArray

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]
BITS = 64
ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

# Work goes through slices of so many words, so that temporaries stay small and in the cache: in a
# scan a byte for each word, otherwise several words.
_SCAN = 1 << 17
_SLICE = 1 << 13


def words_for(bits: int) -> int:
    return -(-bits // BITS)


def granules_for(size: int, granularity: int) -> int:
    return -(-size // granularity)


def nonzero(words: Words) -> Indices:
    """Indices of the words that are not zero. Other writers may set bits meanwhile."""
    found = list(_scan(words))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _scan(words: Words) -> Iterator[Indices]:
    """The same, slice by slice."""
    for start in range(0, len(words), _SCAN):
        # Booleans are a copy, which stays as it is, and are searched several times faster.
        part = (words[start : start + _SCAN] != 0).nonzero()[0]
        if len(part):
            yield part + start


def _slices(words: Words, index: Indices | None) -> Iterator[Indices]:
    """Numbers of the words that are set, `index` if that is known, a few at a time."""
    for part in _scan(words) if index is None else (index,):
        yield from (part[at : at + _SLICE] for at in range(0, len(part), _SLICE))


def any_set(words: Words) -> bool:
    return any(words[i : i + _SCAN].any() for i in range(0, len(words), _SCAN))


def count(words: Words, index: Indices | None = None) -> int:
    """Bits set. Here and below `index`, if given, holds the numbers of the words that are set."""
    parts = (np.unpackbits(words[some].view(np.uint8)) for some in _slices(words, index))
    return sum(int(np.count_nonzero(part.view(np.bool_))) for part in parts)


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
    found = [_places(words[some], some) for some in _slices(words, None)]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _places(words: Words, index: Indices) -> Indices:
    """The numbers of the set bits of `words`, which lie at `index`, ascending.

    Found in as many turns as the fullest word has bits: the lowest of each word, the next …
    """
    base, found = index * BITS, []
    while True:
        left = words.nonzero()[0]
        if len(left) < len(words):
            words, base = words[left], base[left]
        if not len(words):
            break
        lowest = words & (~words + np.uint64(1))
        # A power of two is exact as a float, and its exponent is the number of the bit.
        found.append(base + ((lowest.astype(np.float64).view(np.int64) >> 52) - 1023))
        words = words ^ lowest
    if len(found) == 1:
        return found[0]
    # A stable sort merges what is ascending already.
    return np.sort(np.concatenate(found), kind="stable") if found else base


def _runs(words: Words, index: Indices | None) -> tuple[Indices, Indices]:
    """First and one-past-last bit of every run of set bits."""
    firsts, ends = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    one, top = np.uint64(1), np.uint64(BITS - 1)
    for some in _slices(words, index):
        values = words[some]
        # A run begins with a bit whose lower neighbour is clear, and ends with one whose higher is.
        lower, higher = values << one, values >> one
        adjacent = some[1:] == some[:-1] + 1
        lower[1:] |= (values[:-1] >> top) * adjacent
        higher[:-1] |= (values[1:] << top) * adjacent
        firsts.append(_places(values & ~lower, some))
        ends.append(_places(values & ~higher, some) + 1)
    first, end = np.concatenate(firsts), np.concatenate(ends)
    # Runs were cut at the edges of slices: one that begins where the one before ends continues it.
    apart = first[1:] != end[:-1]
    if apart.all():
        return first, end
    return first[np.r_[True, apart]], end[np.r_[apart, True]]


def extents(words: Words, granularity: int, size: int, index: Indices | None = None) -> ExtentArray:
    """The set bits as coalesced extents in bytes, cut off at `size`."""
    first, end = _runs(words, index)
    inside = int(np.searchsorted(first, granules_for(size, granularity)))
    found: ExtentArray = np.empty((inside, 2), dtype=np.int64)
    found[:, 0] = first[:inside] * granularity
    found[:, 1] = np.minimum(end[:inside] * granularity, size) - found[:, 0]
    return found


def whole_granules(granularity: int, size: int, inside: ExtentArray) -> Iterator[tuple[int, int]]:
    """(first, count) of those wholly inside each extent; one that `size` cuts off counts as whole.

    The count is 0 or less where there are none.
    """
    for start, length in inside.tolist():
        end = start + length
        first = -(-start // granularity)
        last = granules_for(size, granularity) if end >= size else end // granularity
        yield first, last - first


def set_extents(words: Words, granularity: int, size: int, done: ExtentArray) -> None:
    """Set the granules wholly inside `done`."""
    for first, count in whole_granules(granularity, size, done):
        set_range(words, first, count)


def clear_extents(words: Words, granularity: int, size: int, done: ExtentArray) -> None:
    """Clear the granules wholly inside `done`."""
    for first, count in whole_granules(granularity, size, done):
        clear_range(words, first, count)


def words_of(granularity: int, size: int, inside: ExtentArray) -> Indices:
    """Numbers of the words that hold the granules wholly inside extents, ascending."""
    found = [
        np.arange(first // BITS, words_for(first + count))
        for first, count in whole_granules(granularity, size, inside)
        if count > 0
    ]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)
