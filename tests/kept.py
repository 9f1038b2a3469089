"""A stage that is kept, filled without a replica, and what it is known to hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blktrack import extent
from blktrack.extent import ExtentArray
from blktrack.linux import PAGE, Buffer
from blktrack.point import Point
from blktrack.ship.pack import Unpacker, resolve
from blktrack.ship.stage import Stage
from blktrack.units import KIB, SECTOR

LINK, BASE = "link-1", Point(3, "generation-1", 1700000000.5, "crash")


def image_of(stage: Stage) -> bytes:
    """What a stage holds, at its places in the source."""
    index, image = resolve(stage.end.index()), bytearray(stage.size)
    end = Unpacker(stage.file, index, stage.size)
    for start, length in index[:, :2].tolist():
        image[start : start + length] = end.read(start, length)
    return bytes(image)


class Kept:
    """Writes to a stage, small and large, and knows what that makes of a source of zeroes."""

    def __init__(self, folder: Path, size: int, seed: int, most: int | None = None) -> None:
        self.folder, self.size, self.rng = folder, size, np.random.default_rng(seed)
        self.stage = Stage.create(folder, size, link=LINK, base=BASE, keep=True, most=most)
        self.image, self.covered = bytearray(size), extent.empty()

    def write(self, start: int, length: int) -> None:
        data = self.rng.integers(1, 256, length, dtype=np.uint8)
        shift = start % PAGE
        view = Buffer(shift + length).view[shift : shift + length]
        view[:] = data.tobytes()
        self.stage.end.write(view, start)
        self._note(start, data.tobytes())

    def zero(self, start: int, length: int) -> None:
        self.stage.end.zero(start, length)
        self._note(start, bytes(length))

    def write_some(self, count: int = 4) -> None:
        """Some of them anywhere, over each other too."""
        for _ in range(count):
            large = self.rng.random() < 0.1
            length = int(self.rng.integers(1, 700 if large else 24)) * SECTOR
            start = int(self.rng.integers((self.size - length) // SECTOR)) * SECTOR
            (self.zero if self.rng.random() < 0.3 else self.write)(start, length)

    def _note(self, start: int, data: bytes) -> None:
        self.image[start : start + len(data)] = data
        self.covered = extent.union(self.covered, extent.from_pairs([(start, len(data))]))

    def state(self) -> tuple[list[list[int]], bytes]:
        """What is covered and with what."""
        return self.covered.tolist(), bytes(self.image)

    def resume(self, most: int | None = None) -> Stage | None:
        return resume(self.folder, self.size, most)

    def drop(self) -> None:
        self.stage.drop()


def resume(folder: Path, size: int, most: int | None = None) -> Stage | None:
    return Stage.resume(folder, link=LINK, base=BASE, size=size, most=most)


def state_of(stage: Stage) -> tuple[list[list[int]], bytes]:
    return stage.staged.tolist(), image_of(stage)


def seal(stage: Stage, extents: ExtentArray) -> None:
    stage.seal(extents, Point(4, "generation-1", 1700000001.5, "crash"))


SMALL = 512 * KIB
