"""What blktrack remembers of devices and links, and the pending sets.

    LIB/devices/ID/device.json             identity, granularity, generation, doubts
    LIB/devices/ID/links/LINK.json         replica, cursor, what the link is in the middle of
    RUN/kernel.lock                        held while programs and slots change
    RUN/devices/ID/lock                    held while maps are swapped and merged, never for long
    RUN/devices/ID/epoch.json              epoch, is the retired map clear, misses accounted for
    RUN/devices/ID/settling                submitted granules whose completion may still be ahead
    RUN/devices/ID/links/LINK/pending      granules that changed since the link's last drain
    RUN/devices/ID/links/LINK/shipping     granules that the sync under way has to ship

RUN is lost with a boot, and the generation with it. Sets are bitmaps in shared memory: bits are
only added, or cleared after they have a safer home, so a process may die between any two stores:

- drain: kernel map -> `pending`, then the map is cleared. Died before: merged again, adds nothing.
- take: `pending` -> `shipping`, then `pending` is cleared. Died before: shipped from both, once.
  Or, `shipping` being empty, the two files change places in one step.
- ship: replica flushed, then bits of `shipping` are cleared. Died before: shipped again.
- fill: all bits of `shipping` are set, then LINK.json says so. Died before: filled again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from blktrack import bitmap, durable, linux
from blktrack.bitmap import Indices, Words
from blktrack.config import Paths
from blktrack.errors import BlktrackError
from blktrack.point import Point

_FORMAT = 1
_FEW = 16  # a set of which one word in so many is set, or less, keeps its memory when cleared

T = TypeVar("T")


@dataclass
class Doubt:
    """Why a generation ended."""

    generation: str
    reason: str
    time: float


@dataclass
class DeviceState:
    """One device that the user asked to track. Sizes in bytes, times in seconds since the epoch."""

    id: str
    path: str
    name: str  # permanent name, "" if it has none
    wanted: bool = True  # False after untrack
    boot_id: str = ""
    diskseq: int = 0
    size: int = 0
    start: int = 0
    granularity: int = 0
    slot: int = -1
    generation: str = ""  # "" between a doubt and the next generation
    began: float = 0.0
    programs: dict[str, int] = field(default_factory=dict)  # link ids by program
    maps: list[int] = field(default_factory=list)  # ids of the two inner maps
    in_use: str = ""  # why `stop` could not put it to rest, "" if it did or was not asked
    doubts: list[Doubt] = field(default_factory=list)  # newest last


@dataclass
class LinkState:
    """One source and one replica."""

    id: str
    name: str
    target: str
    cursor: Point | None = None  # the last point that the replica committed
    phase: str = ""  # "initial" or "resync" while one is under way
    filled: str = ""  # generation in which `shipping` was filled for that phase
    reason: str = ""  # why a resync


@dataclass
class Epoch:
    """Where the tracking of a device stands; written around each swap."""

    generation: str
    number: int = 0
    clear: bool = True  # the retired map holds nothing
    submit_missed: int = 0  # program runs skipped by the kernel that are accounted for
    complete_missed: int = 0
    submit_unsure: bool = False  # the epoch before missed submissions
    # What is accounted for (account.py), by slot: bytes of unbegun and unended changes.
    accounts: dict[str, list[int]] = field(default_factory=dict)


class BitFile:
    """A bitmap of granules in a file that is memory: stores survive the process at once.

    The file is sparse and only its data is ever scanned. FileNotFoundError if there is none and
    `create` is not set, BlktrackError for one that is too small.
    """

    def __init__(self, path: Path, words: int, *, create: bool = False) -> None:
        self.size = max(words, 1) * 8
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        self._fd = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, self.size)
            if os.fstat(self._fd).st_size < self.size:
                raise BlktrackError(f"{path} is not the pending set of this device")
            self._memory = mmap.mmap(self._fd, self.size)
        except BaseException:
            os.close(self._fd)
            raise
        self.words: Words = np.frombuffer(self._memory, dtype=np.uint64)[:words]

    @staticmethod
    def widen(path: Path, words: int) -> None:
        """Make a set longer; those who have it open go on with what they see of it."""
        if path.stat().st_size < words * 8:
            os.truncate(path, words * 8)

    def nonzero(self) -> Indices:
        """Numbers of the words that are set."""
        found = []
        for start, length in linux.data_extents(self._fd):
            first, end = start // 8, -(-(start + length) // 8)
            found.append(bitmap.nonzero(self.words[first:end]) + first)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def clear(self) -> None:
        """Take all bits away. What few of them lay in stays allocated until a set is left empty.

        The next few bits are then set in a tenth of the time that the kernel needs for new pages.
        """
        index = self.nonzero()
        if 0 < len(index) <= len(self.words) // _FEW:
            self.words[index] = 0
        else:
            linux.punch_hole(self._fd, 0, self.size)

    def close(self) -> None:
        self.words = np.empty(0, dtype=np.uint64)
        # An error on its way up may hold the words; it must not be replaced by one from here.
        with contextlib.suppress(BufferError):
            self._memory.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Store:
    """The files above, by device and link."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths

    @property
    def kernel_lock(self) -> Path:
        return self.paths.run / "kernel.lock"

    def lib(self, device: str) -> Path:
        return self.paths.lib / "devices" / device

    def run(self, device: str) -> Path:
        return self.paths.run / "devices" / device

    def link_run(self, device: str, link: str) -> Path:
        return self.run(device) / "links" / link

    def link_files(self, device: str, name: str) -> list[Path]:
        """This file in RUN of every link that takes part in drains."""
        return sorted((self.run(device) / "links").glob(f"*/{name}"))

    def devices(self) -> list[DeviceState]:
        folder = self.paths.lib / "devices"
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        return [state for name in names if (state := self.device(name))]

    def device(self, device: str) -> DeviceState | None:
        raw = _read(self.lib(device) / "device.json")
        if raw is None:
            return None
        state = _known(DeviceState, raw)
        state.doubts = [_known(Doubt, doubt) for doubt in raw.get("doubts", [])]
        return state

    def save_device(self, state: DeviceState) -> None:
        _write(self.lib(state.id) / "device.json", state)

    def links(self, device: str) -> list[LinkState]:
        folder = self.lib(device) / "links"
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        return [link for file in files if (link := self._link(file))]

    def _link(self, file: Path) -> LinkState | None:
        raw = _read(file)
        if raw is None:
            return None
        link = _known(LinkState, raw)
        link.cursor = _known(Point, raw["cursor"]) if raw.get("cursor") else None
        return link

    def save_link(self, device: str, link: LinkState) -> None:
        _write(self.lib(device) / "links" / f"{link.id}.json", link)

    def epoch(self, device: str) -> Epoch | None:
        raw = _read(self.run(device) / "epoch.json")
        return _known(Epoch, raw) if raw else None

    def save_epoch(self, device: str, epoch: Epoch) -> None:
        _write(self.run(device) / "epoch.json", epoch)


def _write(path: Path, value: Any) -> None:
    durable.write_json(path, {"format": _FORMAT, **dataclasses.asdict(value)})


def _read(path: Path) -> dict[str, Any] | None:
    raw = durable.read_json(path)
    if raw is not None and raw.get("format") != _FORMAT:
        raise BlktrackError(
            f"{path} has format {raw.get('format')}, this version writes {_FORMAT}",
            hint="use the newer blktrack that wrote it",
        )
    return raw


def _known(kind: type[T], raw: dict[str, Any]) -> T:
    """A dataclass from JSON; keys it does not know are left out, a newer minor version's."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in raw.items() if key in names})
