"""The dirty map of one device: two planes of radix-64 levels in one kernel array (see `track.h`)."""

from __future__ import annotations

import ctypes as ct
import mmap
from dataclasses import dataclass

import numpy as np

from blktrack import bitmap
from blktrack.bitmap import Words
from blktrack.bpf import abi, libbpf

_PAGE_WORDS = mmap.PAGESIZE // 8


@dataclass(frozen=True)
class Geometry:
    """How a range of `granules` is laid out, in words."""

    granules: int

    @property
    def levels(self) -> list[int]:
        """Words of each level."""
        sizes = [bitmap.words_for(self.granules)]
        while len(sizes) < abi.LEVELS:
            sizes.append(bitmap.words_for(sizes[-1]))
        return sizes

    @property
    def offsets(self) -> list[int]:
        """First word of each level."""
        levels = self.levels
        return [sum(levels[:i]) for i in range(len(levels))]

    @property
    def plane_words(self) -> int:
        """Words of a plane, whole pages."""
        return -(-sum(self.levels) // _PAGE_WORDS) * _PAGE_WORDS

    @property
    def map_bytes(self) -> int:
        """Kernel memory of one inner map with both planes, its header page included."""
        return 2 * self.plane_words * 8 + mmap.PAGESIZE


class Planes:
    """One inner map in memory: shared with the kernel, no copy. `id` tells maps apart."""

    def __init__(self, fd: int, geometry: Geometry) -> None:
        self.geometry = geometry
        self.fd = fd
        self.id: int = libbpf.info(fd, libbpf.MapInfo).id
        self._memory = mmap.mmap(fd, 2 * geometry.plane_words * 8)
        self._words: Words = np.frombuffer(self._memory, dtype=np.uint64)

    def plane(self, number: int) -> Words:
        """All levels of a plane, raw."""
        words = self.geometry.plane_words
        return self._words[number * words : (number + 1) * words]

    def is_clear(self) -> bool:
        return not bitmap.any_set(self._words)

    def clear(self) -> None:
        """Only for a retired map: bits set meanwhile by a program would be lost."""
        bitmap.clear(self._words)

    def merge_into(self, number: int, target: Words) -> bool:
        """Add the granules of a plane to the bitmap `target`; True if there were any."""
        upper = self._levels(number)
        changed = bitmap.or_into(target, upper[0])
        for level in range(abi.LEVELS - 1, 0, -1):
            full = upper[level]
            if not bitmap.any_set(full):
                continue
            changed = True
            # A bit of this level is a word of granules 64 ** (level - 1) words wide.
            width = bitmap.BITS ** (level - 1)
            for start, length in bitmap.extents(full, width, len(target)).tolist():
                target[start : start + length] = bitmap.ALL
        return changed

    def any_set(self, number: int) -> bool:
        return bitmap.any_set(self.plane(number))

    def _levels(self, number: int) -> list[Words]:
        plane = self.plane(number)
        geometry = self.geometry
        return [
            plane[at : at + size]
            for at, size in zip(geometry.offsets, geometry.levels, strict=True)
        ]

    def close(self) -> None:
        """Unmap; views taken before are invalid afterwards."""
        self._words = np.empty(0, dtype=np.uint64)
        self._memory.close()


def possible_cpus() -> int:
    """How many values an element of a per-CPU map has (libbpf_num_possible_cpus)."""
    return int(libbpf.library().libbpf_num_possible_cpus())


def read_stats(fd: int, slot: int) -> dict[str, int]:
    """Counters of a slot, summed over the CPUs."""
    cpus = possible_cpus()
    raw = libbpf.lookup(fd, ct.c_uint32(slot).value.to_bytes(4, "little"), cpus * abi.STATS.itemsize)
    values = np.frombuffer(raw or b"", dtype=abi.STATS)
    return {name: int(values[name].sum()) for name in abi.STATS.names or ()}
