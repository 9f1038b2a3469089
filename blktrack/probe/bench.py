"""A scratch device under watch: what was marked, against what was written."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from blktrack import bitmap, linux
from blktrack.bitmap import Words
from blktrack.bpf import abi
from blktrack.bpf.kernel import Kernel
from blktrack.probe.room import Room
from blktrack.sysfs import BlockDevice
from blktrack.tracker import doubt
from blktrack.tracker.generation import window_of
from blktrack.units import KIB, MIB, format_size

Range = tuple[int, int]  # start and length in bytes

_GRANULE = 4 * KIB
# Marks as far from what was written are no wonder: of its page, of its folio.
_NEAR = 64 * KIB
LARGEST = 4 * MIB
_PLANES = {abi.SUBMITTED: "begin", abi.COMPLETED: "end"}


class Unseen(Exception):
    """Marks are not as they have to be; how, as a clause."""


class _Marks(NamedTuple):
    planes: dict[int, Words]
    losses: dict[str, int]


class Watched:
    """A device, or a partition of it, in a slot of its own."""

    def __init__(self, kernel: Kernel, device: BlockDevice) -> None:
        self._kernel = kernel
        self._window = window_of(device, device.size, _GRANULE)
        self._slot = kernel.add(self._window)
        self._active, self._retired = kernel.planes(self._slot, self._window.geometry)
        self.begin()

    def _look(self) -> _Marks:
        """All marks, of both maps."""
        planes = {}
        for number in _PLANES:
            planes[number] = np.zeros(self._window.geometry.levels[0], dtype=np.uint64)
            for each in (self._active, self._retired):
                each.merge_into(number, planes[number])
        return _Marks(planes, self._kernel.stats(self._slot))

    def begin(self) -> None:
        """What is marked by now is no matter."""
        self._known = self._look()

    def check(self, written: list[Range]) -> None:
        """Unseen, unless what was marked since the last call, or the begin, is what was written."""
        before, self._known = self._known, self._look()
        now = self._known
        new = {name: count - before.losses[name] for name, count in now.losses.items()}
        if reason := doubt.of_counters(new):
            raise Unseen(reason)
        wanted, near = self._words(written), self._words(written, _NEAR)
        for number, word in _PLANES.items():
            if lost := bitmap.count(wanted & ~now.planes[number]):
                size, whole = lost * _GRANULE, bitmap.count(wanted) * _GRANULE
                raise Unseen(f"{format_size(size)} of {format_size(whole)} were not seen to {word}")
            stray = now.planes[number] & ~before.planes[number] & ~near
            if bitmap.any_set(stray):
                where = int(bitmap.bits(stray)[0]) * _GRANULE
                raise Unseen(f"a change was seen to {word} at byte {where}, where there was none")

    def swap(self) -> None:
        """Let the programs mark the other map from now on."""
        self._kernel.swap(self._slot, self._retired)
        self._active, self._retired = self._retired, self._active

    def has(self, place: Range) -> tuple[bool, bool]:
        """Whether any of a range is marked as completed in the active and in the retired map."""
        asked, found = self._words([place]), []
        for each in (self._active, self._retired):
            words = np.zeros_like(asked)
            each.merge_into(abi.COMPLETED, words)
            found.append(bitmap.any_set(words & asked))
        return found[0], found[1]

    def _words(self, ranges: list[Range], around: int = 0) -> Words:
        geometry = self._window.geometry
        words = np.zeros(geometry.levels[0], dtype=np.uint64)
        for start, length in ranges:
            first = max(start - around, 0) // _GRANULE
            end = min(bitmap.granules_for(start + length + around, _GRANULE), geometry.granules)
            bitmap.set_range(words, first, end - first)
        return words


class Bench:
    """What a probe has at hand: the device, open past the page cache, and its watch."""

    def __init__(self, room: Room, kernel: Kernel, device: BlockDevice, held: ExitStack) -> None:
        self.room, self.kernel, self.device = room, kernel, device
        self.fd = os.open(device.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        held.callback(os.close, self.fd)
        self._buffer = linux.Buffer(LARGEST)
        self.watched = Watched(kernel, device)

    def write(self, start: int, length: int, *, fd: int = -1, flags: int = 0) -> Range:
        """A write in one piece; it has ended on return. OSError."""
        with self._buffer.view[:length] as data:
            done = os.pwritev(self.fd if fd < 0 else fd, [data], start, flags)
        return start, done
