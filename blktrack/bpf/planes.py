"""The dirty map of one device: two planes of radix-64 levels in one kernel array (`track.h`)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from blktrack import bitmap
from blktrack.bitmap import Indices, Words
from blktrack.bpf import abi, libbpf, structs

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
    """One inner map in memory: shared with the kernel, no copy."""

    def __init__(self, fd: int, geometry: Geometry, *, writable: bool = True) -> None:
        self.geometry = geometry
        self.fd = fd
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._memory = mmap.mmap(fd, 2 * geometry.plane_words * 8, access=access)
        self._words: Words = np.frombuffer(self._memory, dtype=np.uint64)

    @cached_property
    def id(self) -> int:
        """The kernel's number of the map, which tells maps apart."""
        return int(libbpf.info(self.fd, structs.MapInfo).id)

    def plane(self, number: int) -> Words:
        """All levels of a plane, raw."""
        words = self.geometry.plane_words
        return self._words[number * words : (number + 1) * words]

    def nonzero(self) -> list[Indices]:
        """Words that are set, of each plane: one scan that serves everything below."""
        return [bitmap.nonzero(self.plane(number)) for number in (abi.SUBMITTED, abi.COMPLETED)]

    def spans(self, number: int, index: Indices) -> tuple[Indices, list[tuple[int, int]]]:
        """What a plane says of words of granules, `index` being its set words.

        Returns the numbers of those that it has bits for, and (first, count) of those full of bits.
        """
        plane, granules = self.plane(number), self.geometry.levels[0]
        words, *levels = np.split(index, np.searchsorted(index, self.geometry.offsets[1:]))
        runs: list[tuple[int, int]] = []
        for level, found in enumerate(levels, start=1):
            if not len(found):
                continue
            # A bit of this level is a run of full words of granules.
            part = plane[self.geometry.offsets[level] :][: self.geometry.levels[level]]
            runs += bitmap.extents(part, bitmap.BITS ** (level - 1), granules).tolist()
        return words, runs

    def merge_into(self, number: int, target: Words, index: Indices | None = None) -> None:
        """Add the granules of a plane to the bitmap `target`; `index` are its set words."""
        plane = self.plane(number)
        words, runs = self.spans(number, bitmap.nonzero(plane) if index is None else index)
        target[words] |= plane[words]
        for first, count in runs:
            target[first : first + count] = bitmap.ALL

    def any_set(self, number: int) -> bool:
        return bitmap.any_set(self.plane(number))

    def clear(self, found: list[Indices]) -> None:
        """Zero the words `found` set. Only for a retired map: later marks would be lost."""
        for number, index in enumerate(found):
            self.plane(number)[index] = 0

    def close(self) -> None:
        """Unmap; views taken before are invalid afterwards."""
        self._words = np.empty(0, dtype=np.uint64)
        self._memory.close()


def possible_cpus() -> int:
    """How many values an element of a per-CPU map has (libbpf_num_possible_cpus). OSError."""
    count = int(libbpf.library().libbpf_num_possible_cpus())
    if count < 0:
        raise OSError(-count, f"cannot count CPUs: {os.strerror(-count)}")
    return count


Reading = Callable[[], dict[str, int]]


def stats_reader(fd: int, slot: int) -> Callable[[], Reading]:
    """A function that reads the counters of a slot; what it returns sums them over the CPUs."""
    key, size = slot.to_bytes(4, "little"), possible_cpus() * abi.STATS.itemsize

    def read() -> Reading:
        raw = libbpf.lookup(fd, key, size)

        def decode() -> dict[str, int]:
            values = np.frombuffer(raw or b"", dtype=abi.STATS)
            return {name: int(values[name].sum()) for name in abi.STATS.names or ()}

        return decode

    return read
