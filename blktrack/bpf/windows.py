"""Which part of which disk each slot tracks, in memory shared with the programs (track.h).

The programs search the slots of a kind up to its count; the slots of one disk are a chain, by
which they find all that one change touches.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blktrack.bpf import abi
from blktrack.bpf.planes import Geometry
from blktrack.bpf.programs import BY_KIND
from blktrack.errors import BlktrackError
from blktrack.units import SECTOR


@dataclass(frozen=True)
class Window:
    """What a slot tracks. Bytes, counted on the whole disk."""

    disk: int  # abi.disk_number
    kind: int
    start: int
    length: int
    granularity: int
    whole: bool

    @property
    def geometry(self) -> Geometry:
        return Geometry(-(-self.length // self.granularity))


class Windows:
    """The map `windows`, open in `fd`, which the caller keeps."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._memory = mmap.mmap(fd, abi.WINDOWS.itemsize, access=access)
        whole: NDArray[Any] = np.frombuffer(self._memory, dtype=abi.WINDOWS)
        self._disks, self._counts, self._entries = (
            whole[name][0] for name in ("dev", "count", "window")
        )

    def window(self, slot: int) -> Window | None:
        """What a slot tracks now; None if it is free."""
        for kind in BY_KIND:
            if disk := int(self._disks[kind, slot]):
                entry = self._entries[slot]
                start, end = int(entry["start"]) * SECTOR, int(entry["end"]) * SECTOR
                granularity = SECTOR << int(entry["shift"])
                return Window(disk, kind, start, end - start, granularity, bool(entry["whole"]))
        return None

    def slots(self, disk: int, start: int) -> list[int]:
        """Slots whose window begins there: one at most, unless a death left another behind."""
        found = ((slot, self.window(slot)) for slot in range(abi.SLOTS))
        return [slot for slot, w in found if w and (w.disk, w.start) == (disk, start)]

    def used(self, kind: int) -> list[int]:
        return np.flatnonzero(self._disks[kind]).tolist()

    def free_slot(self) -> int:
        """One that tracks nothing and is in no chain. BlktrackError if all are in use."""
        free = next((slot for slot in range(abi.SLOTS) if self.window(slot) is None), None)
        if free is None:
            raise BlktrackError(
                f"{abi.SLOTS} devices are tracked already, which is the most there can be",
                hint="blktrack untrack one that is not needed (blktrack status lists them)",
            )
        self._relink()  # a death in `clear` may have left it in one
        return free

    def set(self, slot: int, window: Window, *, settled: bool) -> None:
        """Let the programs find a free slot: with this, it is in use."""
        geometry, entry = window.geometry, self._entries[slot]
        entry["start"] = window.start // SECTOR
        entry["end"] = (window.start + window.length) // SECTOR
        entry["shift"] = (window.granularity // SECTOR).bit_length() - 1
        entry["whole"] = window.whole
        entry["settled"] = settled
        entry["level"] = geometry.offsets
        entry["plane_words"] = geometry.plane_words
        # A whole chain leads on from here before the slot is found, so that walks of the disk's
        # slots (mark_ranges) come by all the others at any time, and whatever dies.
        same = self._chain(window.kind, window.disk)
        entry["next"] = min((s for s in same if s > slot), default=abi.SLOTS)
        entry["first"] = min([*same, slot])
        self._disks[window.kind, slot] = window.disk
        self._relink()

    def settle(self, slot: int) -> None:
        """From here on a bio that ends without having been seen to begin is a loss."""
        self._entries[slot]["settled"] = 1

    def clear(self, slot: int) -> None:
        """Let the programs find it no more."""
        self._disks[:, slot] = 0
        self._relink()

    def _chain(self, kind: int, disk: int) -> list[int]:
        return [slot for slot in self.used(kind) if int(self._disks[kind, slot]) == disk]

    def _relink(self) -> None:
        """Chain the slots of each disk and bound the programs' search."""
        for kind in BY_KIND:
            used = self.used(kind)
            for slot in used:
                same = self._chain(kind, int(self._disks[kind, slot]))
                self._entries[slot]["next"] = min((s for s in same if s > slot), default=abi.SLOTS)
                self._entries[slot]["first"] = same[0]
            self._counts[kind] = used[-1] + 1 if used else 0
