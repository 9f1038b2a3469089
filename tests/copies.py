"""Images, extents and replicas for tests of copies, and what a copy has to make of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from blktrack import linux
from blktrack.extent import ExtentArray, from_pairs
from blktrack.units import KIB, SECTOR


def image(rng: np.random.Generator, size: int, zeroes: float = 0.4) -> bytearray:
    """Random bytes in which runs of 64 KiB pieces, and some odd ranges, are zero."""
    data = rng.integers(0, 256, size, dtype=np.uint8)
    for start in range(0, size, 64 * KIB):
        if rng.random() < zeroes:
            data[start : start + 64 * KIB] = 0
    for _ in range(5):
        start = int(rng.integers(size))
        data[start : start + int(rng.integers(1, 100 * KIB))] = 0
    return bytearray(data)


def random_extents(rng: np.random.Generator, size: int, unit: int = SECTOR) -> ExtentArray:
    """Disjoint extents in multiples of `unit`, small and large, often with the device's end."""
    pairs = []
    for _ in range(int(rng.integers(1, 60))):
        start = int(rng.integers(size // unit)) * unit
        length = int(rng.integers(1, int(rng.choice([3, 9, 100, 2000])))) * unit
        pairs.append((start, min(length, size - start)))
    if rng.random() < 0.5:
        pairs.append((size - unit, unit))
    return from_pairs(pairs)


def whole(size: int) -> ExtentArray:
    return from_pairs([(0, size)])


def fill(path: Path, data: bytes | bytearray) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if path.is_block_device():
            linux.flush_buffers(file.fileno())


def content(path: Path) -> bytes:
    with path.open("rb") as file:
        if path.is_block_device():
            linux.flush_buffers(file.fileno())
        return file.read()


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def patched(old: bytes | bytearray, new: bytes | bytearray, extents: ExtentArray) -> bytes:
    """`old` with the extents of `new` in it: what a copy has to make of a replica."""
    result = bytearray(old)
    for start, length in extents.tolist():
        result[start : start + length] = new[start : start + length]
    return bytes(result)


def copy_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("copy-")]
