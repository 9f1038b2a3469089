"""What a disk was told to write, as qemu's blklogwrites recorded it, and the replay of any prefix.

The format is that of Linux's drivers/md/dm-log-writes.c: a sector of super block (magic, version,
count of entries, sector size), then for each entry a sector of header (sector, sectors, flags,
length of a mark) and its data; discards have none. qemu's block/blklogwrites.c gives an entry its
place when the image has the data, and tells the guest after that: so the place of a write in the
log lies between its submission and its completion, and the log is in the order of the image.

FUA is not told: qemu makes a flush of its own after such a write, and that passes the log by where
nothing else was written since the flush before (bdrv_co_flush counts a write when all of it has
ended). What is to be known of caches is therefore known of disks without FUA alone: virtio-blk and
virtio-scsi, for which the kernel sends a flush.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blktrack.units import SECTOR
from tests.sectors import Image

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
MAGIC = 0x6A73_6677_7368_72
_SUPER, _HEADER = struct.Struct("<QQQI"), struct.Struct("<QQQQ")
_WORDS = SECTOR // 8
_WEIGHTS = np.arange(1, 2 * _WORDS, 2, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
_FACTOR = np.uint64(0xD6E8_FEB8_6659_FD93)


class Entry(NamedTuple):
    """`length` bytes for byte `start` on, which are at byte `data` of the log."""

    start: int
    length: int
    flags: int
    data: int

    @property
    def is_change(self) -> bool:
        return self.length > 0 and not self.flags & MARK


class WriteLog:
    """A log whose writer has ended. ValueError if it is none."""

    def __init__(self, path: Path) -> None:
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        magic, version, count, self.sector = _SUPER.unpack(self._at(0, _SUPER.size))
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"{path} is no write log of version 1")
        self.entries: list[Entry] = []
        at = self.sector
        for _ in range(count):
            sector, sectors, flags, mark = _HEADER.unpack(self._at(at, _HEADER.size))
            at += self.sector
            start, length = sector * self.sector, sectors * self.sector
            self.entries.append(Entry(start, length, flags, at))
            if flags & MARK:
                at += -(-mark // self.sector) * self.sector
            elif not flags & DISCARD:
                at += length
        if at > len(self._bytes):
            raise ValueError(f"{path} ends within an entry: {len(self._bytes)} bytes of {at}")

    def _at(self, start: int, length: int) -> bytes:
        return self._bytes[start : start + length].tobytes()

    def data(self, entry: Entry) -> Image:
        """What the entry leaves in its place: a discard, zeroes, as a raw image has them."""
        if entry.flags & DISCARD:
            return np.zeros(entry.length, dtype=np.uint8)
        return np.asarray(self._bytes[entry.data : entry.data + entry.length])

    def replay(self, image: Image, first: int = 0, last: int | None = None) -> None:
        """Do entries `first` to before `last` to an image."""
        for entry in self.entries[first:last]:
            if entry.is_change:
                image[entry.start : entry.start + entry.length] = self.data(entry)


def digests(image: Image) -> NDArray[np.uint64]:
    """A number for each sector of an image, the same for the same bytes."""
    words = image.view(np.uint64).reshape(-1, _WORDS)
    mixed = (words ^ (words >> np.uint64(31))) * _WEIGHTS
    mixed ^= mixed >> np.uint64(29)
    mixed *= _FACTOR
    mixed ^= mixed >> np.uint64(32)
    return np.asarray(mixed.sum(axis=1, dtype=np.uint64))
