"""What is written to a source between two syncs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from blktrack.linux import PAGE, Buffer
from blktrack.units import KIB, MIB
from tools.benchmark.lab import Disk

Changes = list[tuple[int, bytes]]  # where, what; sorted, disjoint
RUN = 64 * KIB
MIXED = (
    "half of the bytes in single pages of 4 KiB at random places, half in runs of 64 KiB at "
    "random places, as databases write; half of the places random bytes, half text"
)
_WORDS = 8192


class Maker:
    """Makes contents and places at random."""

    def __init__(self) -> None:
        self._random = np.random.Generator(np.random.SFC64())
        letters = self._random.integers(ord("a"), ord("z") + 1, (_WORDS, 12), np.uint8)
        lengths = self._random.integers(2, 13, _WORDS)
        self._words = [
            bytes(word[:length]) for word, length in zip(letters, lengths.tolist(), strict=True)
        ]

    def noise(self, count: int) -> bytes:
        return self._random.bytes(count)

    def text(self, count: int) -> bytes:
        """Words of a vocabulary, few of them often: to zstd about what prose is."""
        found = bytearray()
        while len(found) < count:
            numbers = self._random.zipf(1.3, count // 8 + 1) % _WORDS
            found += b" ".join([self._words[number] for number in numbers.tolist()]) + b"\n"
        return bytes(found[:count])

    def mixed(self, size: int, count: int) -> Changes:
        """About `count` bytes for a device of `size`: see MIXED."""
        runs, pages = count // 2 // RUN, count // 2 // PAGE
        slots = self._random.choice(size // RUN, runs + pages, replace=False)
        shifts = self._random.integers(0, RUN // PAGE, runs + pages) * PAGE
        shifts[:runs] = 0
        places = (slots * RUN + shifts).tolist()
        lengths = [RUN] * runs + [PAGE] * pages
        left = {True: self.text(count), False: self.noise(count)}
        used = {True: 0, False: 0}
        found = []
        for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
            kind = number % 2 == 0
            found.append((place, left[kind][used[kind] : used[kind] + length]))
            used[kind] += length
        return sorted(found)


def whole(data: bytes) -> Changes:
    """All at one place, from the beginning on."""
    return [(at, data[at : at + MIB]) for at in range(0, len(data), MIB)]


def put(target: Disk | Path, changes: Changes) -> None:
    """Write them, past the cache where that is a device."""
    device = isinstance(target, Disk)
    path = target.path if isinstance(target, Disk) else target
    buffer = Buffer(max(len(data) for _, data in changes))
    fd = os.open(path, os.O_WRONLY | (os.O_DIRECT if device else 0))
    try:
        for at, data in changes:
            buffer.view[: len(data)] = data
            os.pwrite(fd, buffer.view[: len(data)], at)
    finally:
        os.close(fd)


@contextlib.contextmanager
def lent(path: Path, changes: Changes) -> Iterator[None]:
    """A file to whoever makes these changes in it; it is as it was afterwards."""
    with path.open("rb") as file:
        before = [(at, os.pread(file.fileno(), len(data), at)) for at, data in changes]
    try:
        yield
    finally:
        put(path, before)
