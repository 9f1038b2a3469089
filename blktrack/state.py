"""What blktrack remembers of devices and links, and the pending sets.

    LIB/devices/ID/device.json             identity, granularity, generation, doubts
    LIB/devices/ID/links/LINK.json         replica, cursor, what the link is in the middle of
    LIB/devices/ID/history.jsonl           what each run of a link did, see history.py
    LIB/devices/ID/rest.json, LINK.rest    while at rest: the device's fingerprint, pending sets
    LIB/probe.json                         what kernels were found to show, see probe/verdict.py
    RUN/kernel.lock                        held while programs and slots change
    RUN/devices/ID/lock                    held while maps are swapped and merged, never for long
    RUN/devices/ID/epoch.json              epoch, table, is the retired map clear, misses known
    RUN/devices/ID/settling                submitted granules whose completion may still be ahead
    RUN/devices/ID/links/LINK/pending      granules that changed since the link's last drain
    RUN/devices/ID/links/LINK/shipping     granules that the sync under way has to ship
    RUN/devices/ID/links/LINK/held         granules that an unsealed stage elsewhere holds durably
    RUN/devices/ID/links/LINK/racing       granules submitted to since its swap, while it captures

RUN is lost with a boot, and the generation with it, unless the device was at rest. Sets are bitmaps
in shared memory. Bits are only added, or cleared after they have a safer home, and a JSON file is
replaced in one step, so a process may die between any two stores. What is then true:

- begin: slot, `settling`, epoch.json, device.json. Died before the last: the slot is nobody's, and
  the next beginning on that disk takes it away.
- drain: epoch.json says not clear, swap, retired map -> `pending` of each link, -> `settling`, the
  map is cleared, epoch.json. Died before the last: all of it is done again, and adds nothing.
- take: `pending` -> `shipping`, then `pending` is cleared; or, `shipping` being empty, the two
  change places in one step. Died before: shipped from both, once.
- fill: all bits of `shipping` are set, `pending` is cleared, LINK.json says so. Died before the
  last: more is shipped than had to be, and filled again.
- ship, a full copy or a resync: the replica's record says between two points, data, flush, bits of
  `shipping` are cleared. Died before the last: shipped again.
- ship, either of them or in place, elsewhere: LINK.json says so before. Died in between: the
  replica is told to be at no point, which it may still be.
- ship, an increment: staged, sealed, applied; no bit is cleared before the commit. Died before the
  seal: the replica is as it was. After: its next user finishes it.
- ship, an increment in place: the replica's record says half-way from its point, data, flush; no
  bit is cleared before the commit. Died before that: all of it is shipped again, into what was
  written of it as into a replica that was restored to that point.
- ship, an increment staged elsewhere: LINK.json names the stage; data, flush there, LINK.json says
  how much of it there is, bits are set in `held` and then cleared in `shipping`. Died in between:
  shipped again, over what is there. After: the next sync ships the rest into that stage, and seals
  what it holds with it.
- give back, if another stage or none is there: bits of `held` are set in `shipping`, `held` is
  cleared, LINK.json names no stage. Died in between: given back again.
- commit: LINK.json has the point to come, the replica's record says that it is there, LINK.json has
  the cursor, `held` and `shipping` are cleared. Died before the second: the point is forgotten.
  Before the third: the replica is ahead of its link, which follows it; what was taken until then is
  on the replica, and is cleared. Before the last: shipped again.
- send: `shipping` is taken and streamed, LINK.json says where that led. Died before the last: sent
  again. Committed by its user: LINK.json has the cursor, `shipping` is cleared, if nothing more was
  taken since.
- grow: a second slot, a last drain of the first, longer sets, epoch.json, device.json names the
  second. Died before the last: the first slot is in force, the second nobody's, all is done again.
- stop: LINK.rest with all that is in its sets, rest.json, device.json says resting, the slot goes.
  Died before resting: it is tracked on. After: at rest, with a slot that is nobody's.
- start: sets, slot, epoch.json, device.json says not resting, the rest goes. Died before that: at
  rest; what was written since, with the slot nobody's, is found by the kernel's count of sectors.
- end: device.json has the doubt and no generation. Whatever of it is left is never looked at again.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from blktrack import durable
from blktrack.config import Paths
from blktrack.errors import BlktrackError
from blktrack.point import Point

_FORMAT = 1
_KEPT_DOUBTS = 20

T = TypeVar("T")


@dataclass
class Doubt:
    """Why a generation ended, or a replica had to be compared."""

    generation: str
    reason: str
    time: float
    number: int = 0  # how many there had been by then, with those that are forgotten

    @staticmethod
    def add(doubts: list[Doubt], generation: str, reason: str) -> None:
        """Put one on record; the oldest are forgotten."""
        doubts.append(Doubt(generation, reason, time.time(), Doubt.count(doubts) + 1))
        del doubts[:-_KEPT_DOUBTS]

    @staticmethod
    def count(doubts: list[Doubt]) -> int:
        """Of all that ever were on record."""
        return max(len(doubts), doubts[-1].number) if doubts else 0


@dataclass
class DeviceState:
    """One device that the user asked to track. Sizes in bytes, times in seconds since the epoch."""

    id: str
    path: str
    name: str  # permanent name, "" if it has none
    wanted: bool = True  # False after untrack
    boot_id: str = ""
    release: str = ""  # of the kernel: the programs are made for one
    diskseq: int = 0
    size: int = 0
    start: int = 0
    granularity: int = 0
    slot: int = -1
    generation: str = ""  # "" between a doubt and the next generation
    began: float = 0.0
    programs: dict[str, list[int]] = field(default_factory=dict)  # ids of links, by program
    maps: list[int] = field(default_factory=list)  # ids of the two inner maps
    resting: bool = False  # put to rest by `stop`: nothing is attached, see Rest
    in_use: str = ""  # why `stop` could not put it to rest
    doubts: list[Doubt] = field(default_factory=list)  # newest last


@dataclass
class Rest:
    """A generation across a clean stop: what has to be the same when tracking goes on."""

    generation: str
    epoch: int
    time: float
    boot_id: str  # the boot in which `written` goes on counting
    written: int  # fingerprint.sectors_written
    places: list[list[int]]
    fingerprint: str
    table: list[str] | None = None  # as Epoch


@dataclass
class LinkState:
    """One source and one replica."""

    id: str
    name: str
    target: str  # "": streams, whose receiver is not known here
    route: str = ""  # to a replica on another host, when it was last reached
    mount: str = ""  # of a replica file: where the file system is mounted that it is on
    cursor: Point | None = None  # the last point that the replica committed
    phase: str = ""  # "initial" or "resync" while one is under way
    filled: str = ""  # generation in which `shipping` was filled for that phase
    reason: str = ""  # why a resync
    doubts: list[Doubt] = field(default_factory=list)  # of the replica, newest last
    sent: list[Point] = field(default_factory=list)  # where streams led of which no commit is known
    settles: bool = False  # the commit of the last of them leaves nothing in `shipping`
    stage: str = ""  # the id of the stage elsewhere that `held` is about
    mark: int = 0  # how much of it its keeper has, at least, while it holds all of `held`
    sealing: Point | None = None  # which the replica was asked to commit, and may have
    away: bool = False  # a replica elsewhere is on its way from one point to another

    def __str__(self) -> str:
        return self.target or f"link {self.name}"

    def move_to(self, point: Point) -> None:
        """The replica has committed this point. A stream that starts before it is void."""
        self.cursor = point
        self.phase = self.filled = self.reason = ""
        self.sent, self.settles = [], False
        self.stage, self.mark, self.sealing, self.away = "", 0, None, False


@dataclass
class Epoch:
    """Where the tracking of a device stands; written around each swap."""

    generation: str
    number: int = 0
    clear: bool = True  # the retired map holds nothing
    # Events that the programs were not run for, as far as they are accounted for.
    submit_missed: int = 0
    complete_missed: int = 0
    submit_unsure: bool = False  # the epoch before missed submissions
    # What is accounted for (account.py), by slot: bytes of unbegun and unended changes.
    accounts: dict[str, list[int]] = field(default_factory=dict)
    table: list[str] | None = None  # of its device-mapper disk (mapper.py); None: not known yet


class Store:
    """The files above, by device and link."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths

    @property
    def kernel_lock(self) -> Path:
        return self.paths.run / "kernel.lock"

    def lib(self, device: str) -> Path:
        return self.paths.lib.joinpath("devices", device)

    def run(self, device: str) -> Path:
        return self.paths.run.joinpath("devices", device)

    def link_lock(self, device: str, link: str) -> Path:
        """Held by whoever moves bits of the link towards a receiver."""
        return self.run(device) / f"{link}.lock"

    def link_run(self, device: str, link: str) -> Path:
        return self.run(device) / "links" / link

    def link_files(self, device: str, name: str) -> list[Path]:
        """This file in RUN of every link that takes part in drains."""
        return sorted((self.run(device) / "links").glob(f"*/{name}"))

    def ids(self) -> list[str]:
        """Of all devices that are remembered."""
        folder = self.paths.lib / "devices"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def devices(self) -> list[DeviceState]:
        return [state for number in self.ids() if (state := self.device(number))]

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
        return [link for file in files if (link := self.link(file))]

    def link(self, file: Path) -> LinkState | None:
        raw = _read(file)
        if raw is None:
            return None
        link = _known(LinkState, raw)
        link.doubts = [_known(Doubt, doubt) for doubt in raw.get("doubts", [])]
        link.cursor = _known(Point, raw["cursor"]) if raw.get("cursor") else None
        link.sealing = _known(Point, raw["sealing"]) if raw.get("sealing") else None
        link.sent = [_known(Point, point) for point in raw.get("sent", [])]
        return link

    def save_link(self, device: str, link: LinkState) -> None:
        _write(self.lib(device) / "links" / f"{link.id}.json", link)

    def rest(self, device: str) -> Rest | None:
        raw = _read(self.lib(device) / "rest.json")
        return _known(Rest, raw) if raw else None

    def save_rest(self, device: str, rest: Rest) -> None:
        _write(self.lib(device) / "rest.json", rest)

    def drop_rest(self, device: str) -> None:
        """Forget a rest that is over. Whether it holds is said by `resting` alone."""
        for path in (*self.lib(device).glob("*.rest"), self.lib(device) / "rest.json"):
            path.unlink(missing_ok=True)

    def epoch(self, device: str) -> Epoch | None:
        raw = _read(self.run(device) / "epoch.json")
        return _known(Epoch, raw) if raw else None

    def save_epoch(self, device: str, epoch: Epoch) -> None:
        _write(self.run(device) / "epoch.json", epoch)


def _write(path: Path, value: Any) -> None:
    durable.write_json(path, {"format": _FORMAT, **durable.plain(value)})


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
