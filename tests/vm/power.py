"""What a power cut must leave, judged from logs that outlive the machine.

Both lie in the share of the machine, where each line is on the host before the guest goes on:

    writes-NAME    of a source: before each write which one begins, so the one before has ended
    events         of the machine: when a sync began and ended, and at which point

A replica that is at a point holds of each chain (tests/chains.py) all that had ended before the
point, and nothing that was begun after it. The point is that of the last sync that was told to have
ended, or a later one: of the sync that was cut off.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from blktrack.config import Paths
from blktrack.point import Point
from blktrack.ship.apply import finish
from blktrack.ship.place import inspect
from blktrack.ship.record import State
from tests import chains
from tests.blockdev import read_image

# The sources of a machine: those of one driver's events, as each costs a compilation in a boot.
SOURCES = {"disks": ("virtio-blk", "nvme-4096"), "volumes": ("lvm-linear", "md-raid1")}
REPLICAS = ("ext4", "device", "ssh", "xfs")
CHAINS = 2  # of a source
SIZE = CHAINS * chains.CHAIN
JOB, EVENTS, CUT = "job", "events", "cut"  # files in the share
FAR = "far"  # a folder there, on the host: with the replica of the other host

_NOTE = np.dtype([("chain", "<i8"), ("number", "<i8"), ("time", "<f8")])


@dataclass(frozen=True)
class Job:
    """What the machine does from one boot to the cut."""

    boot: int
    replicas: dict[str, str]  # of each source: one of REPLICAS
    far: str  # "ssh://…": the folder of the other host
    source: str  # whose sync is cut
    when: str  # first, later, idle, stop, foreign, last: see tests/vm/powered.py
    at: str = ""  # the crash point; "": as soon as it is time
    hold: bool = False  # stay there
    busy: bool = False  # write from the beginning on

    def write(self, share: Path) -> None:
        (share / JOB).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, share: Path) -> Self:
        return cls(**json.loads((share / JOB).read_text(encoding="utf-8")))


class Events:
    """Lines of JSON, each with its boot and the source that it is of."""

    def __init__(self, share: Path) -> None:
        self._path = share / EVENTS

    def add(self, boot: int, kind: str, source: str, **more: object) -> None:
        about = {"time": time.time(), "boot": boot, "kind": kind, "source": source}
        line = json.dumps({**about, **more})
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, line.encode() + b"\n")
        finally:
            os.close(fd)

    def of(self, source: str, *kinds: str) -> list[dict[str, Any]]:
        return [each for each in self.all() if each["source"] == source and each["kind"] in kinds]

    def begun(self, source: str) -> list[float]:
        """When syncs began that are not known to have ended."""
        since: list[float] = []
        for each in self.of(source, "begin", "end"):
            since = [*since, each["time"]] if each["kind"] == "begin" else []
        return since

    def all(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]


class Writes:
    """Which writes of a source began, and when. A write that began again was cut off."""

    def __init__(self, share: Path, source: str) -> None:
        self._path = share / f"writes-{source}"
        self._fd = -1

    def begins(self, chain: int, number: int) -> None:
        """The one before has ended. On return the host knows."""
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.lseek(self._fd, 0, os.SEEK_END)
        os.write(self._fd, np.array((chain, number, time.time()), dtype=_NOTE).tobytes())

    def notes(self) -> NDArray[np.void]:
        raw = self._path.read_bytes() if self._path.exists() else b""
        return np.frombuffer(raw[: len(raw) // _NOTE.itemsize * _NOTE.itemsize], dtype=_NOTE)

    def last(self, chain: int) -> int:
        """The write to go on with: it may not have ended."""
        notes = self.notes()
        return int(notes["number"][notes["chain"] == chain].max(initial=1))


def judge(image: NDArray[np.uint8], notes: NDArray[np.void], point: Point) -> str:
    """What is wrong with a replica at this point; "" if nothing is."""
    if point.consistency != "crash":
        return f"its consistency is {point.consistency}"
    for chain in range(CHAINS):
        of = notes[notes["chain"] == chain]
        ended = of["number"][of["time"] < point.time].max(initial=1) - 1
        begun = of["number"][of["time"] <= point.time].max(initial=0)
        verdict = chains.judge(image[:SIZE], chain, int(ended), int(begun))
        if verdict.fault:
            return verdict.fault
    return ""


@dataclass
class Found:
    """A replica as the cut left it."""

    state: str  # none, unfinished, old, new, waiting, applying
    fault: str = ""


def look(target: str, paths: Paths, source: str, share: Path, boot: int) -> Found:
    """Judge a replica after the cut that ended `boot`, then have what waits for it finished."""
    events, notes = Events(share), Writes(share, source).notes()
    ends = events.of(source, "end")
    last = max((end["point"] for end in ends), default=0.0)
    record, changed = inspect(target, paths)
    if record is None:
        return Found("none", f"the replica at {last} is gone" if ends else "")
    if changed:
        return Found(str(record.state), f"it is said to have changed: {changed}")
    if record.state is State.UNFINISHED:
        # An initial copy or a resync, which are the first of a boot: any other has a point to keep.
        ended = any(end["boot"] == boot for end in ends)
        return Found("unfinished", "an increment left it without a point" if ended else "")
    assert record.point is not None
    state = "old" if record.point.time == last else "new"
    if record.state is State.READY:
        if record.point.time < last:
            return Found(state, f"it went back from the point {last} to {record.point.time}")
        if state == "new" and not any(at <= record.point.time for at in events.begun(source)):
            return Found(state, f"its point {record.point.time} is of no sync")
        if fault := judge(read_image(target), notes, record.point):
            return Found(state, f"at its {state} point: {fault}")
    if record.next is None:
        applying = record.state is State.APPLYING
        return Found(state, "an increment left it between two points" if applying else "")
    state = "applying" if record.state is State.APPLYING else "waiting"
    record = finish(target, paths)
    if record is None or record.state is not State.READY or record.point is None:
        return Found(state, f"what waited did not bring it to a point: {record}")
    if fault := judge(read_image(target), notes, record.point):
        return Found(state, f"brought to its new point: {fault}")
    return Found(state)
