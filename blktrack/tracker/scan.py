"""Which granules of a device are dirty, read without a lock while others drain and ship.

Bits move one way: from the active map to `pending` of each link, from there to `shipping`, perhaps
to `held`, and are gone when a replica has them. Each step sets a bit in its new home before it is
cleared in the old one. So whoever reads in that order (maps, pending, shipping, held) misses no bit
that was set before he began and has not been shipped. Three things need care:

- Which of the two maps is active. The retired one is empty unless epoch.json says that it may not
  be, which is written before each swap. If that, or the active map, is not the same after the look
  at the maps as before it, both maps are looked at.
- `pending` and `shipping` may change places, but only while `shipping` is empty; either may be
  unlinked, cut and made anew. They are therefore read by read(2) from what the file holds at that
  moment, never mapped: a store cut off under a mapping kills the process, and a hole that is read
  through one takes memory.
- `held` may be given back to `shipping`. It is therefore read before that, too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blktrack import bitfile, bitmap
from blktrack.bitmap import Indices, Words
from blktrack.bpf import abi
from blktrack.bpf.planes import Planes

CELLS = 256
_EXACT = CELLS * bitmap.BITS  # granules; from here on a word lies in two cells at most

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Stand:
    """Where a device's maps stand: the same twice, nothing was swapped in between."""

    epoch: int
    clear: bool  # the retired map is empty
    active: int  # id of the active map


@dataclass(frozen=True)
class Scan:
    """Counts are granules."""

    at: float  # time.monotonic
    cost: float  # CPU seconds that it took
    stand: Stand
    live: int  # changed since the last drain
    dirty: int  # these, and all that any link has to ship
    pending: dict[str, int | None]  # by link; None: its sets are gone
    heat: list[float]
    shipping: bool  # some of it is on its way


def scan(
    maps: Sequence[Planes],
    stand: Callable[[], Stand],
    links: Mapping[str, Path],
    *,
    granules: int,
) -> Scan:
    """One look at everything; `links` are the folders of their sets."""
    at, begun = time.monotonic(), time.thread_time()
    live: Words = np.zeros(bitmap.words_for(granules), dtype=np.uint64)
    before = stand()
    _merge([planes for planes in maps if planes.id == before.active or not before.clear], live)
    after = stand()
    if after != before or not after.clear:
        _merge(maps, live)
    every, pending, shipping = live.copy() if links else live, {}, False
    for link, folder in links.items():
        found = live.copy() if len(links) > 1 else every
        there = bitfile.add(folder / "pending", found) is not None
        bitfile.add(folder / "held", found)
        some = bitfile.add(folder / "shipping", found)
        bitfile.add(folder / "held", found)
        shipping |= bool(some)
        pending[link] = _count(found) if there and some is not None else None
        if len(links) > 1:
            every |= found
    index = bitmap.nonzero(every)
    counts = popcount(every[index])
    return Scan(
        at=at,
        stand=after,
        live=_count(live),
        dirty=int(counts.sum()),
        pending=pending,
        heat=heat(every, index, counts, granules),
        shipping=shipping,
        cost=time.thread_time() - begun,
    )


def _merge(maps: Sequence[Planes], target: Words) -> None:
    for planes in maps:
        planes.merge_into(abi.COMPLETED, target)


def popcount(words: Words) -> Counts:
    """Bits set in each word."""
    counted: Counts
    if count := getattr(np, "bitwise_count", None):  # numpy 2
        counted = np.asarray(count(words), dtype=np.int64)
    else:
        bits = np.unpackbits(words.view(np.uint8)).reshape(-1, bitmap.BITS)
        counted = bits.sum(axis=1, dtype=np.int64)
    return counted


def _count(words: Words) -> int:
    return int(popcount(words[bitmap.nonzero(words)]).sum())


def heat(words: Words, index: Indices, counts: Counts, granules: int) -> list[float]:
    """The share dirty of each of up to CELLS equal parts; any bit set makes it more than 0.

    index, counts -- the words that are set, and how many bits each has.
    """
    cells = min(CELLS, granules)
    edges, widths = _edges(cells, granules)
    if granules < _EXACT:
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:granules]
        sums = np.add.reduceat(bits, edges[:-1], dtype=np.int64)
    else:
        first = index * bitmap.BITS
        last = np.minimum(first + bitmap.BITS, granules) - 1
        low, high = (((at + 1) * cells - 1) // granules for at in (first, last))
        # What of a word lies below the edge that cuts it.
        inside = np.where(low == high, bitmap.BITS - 1, edges[high] - first).astype(np.uint64)
        mask = np.where(low == high, bitmap.ALL, (np.uint64(1) << inside) - np.uint64(1))
        below = popcount(words[index] & mask)
        sums = np.bincount(low, weights=below, minlength=cells)
        sums = sums + np.bincount(high, weights=counts - below, minlength=cells)
    shares = (sums / widths).tolist()
    return [max(round(share, 4), 0.0001) if share else 0.0 for share in shares]


@functools.lru_cache(maxsize=64)
def _edges(cells: int, granules: int) -> tuple[Indices, Indices]:
    """Granules between the parts, and in each."""
    edges = np.arange(cells + 1) * granules // cells
    return edges, np.diff(edges)
