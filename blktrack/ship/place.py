"""A target, the state kept beside it, and the steps from one point to the next on record."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from blktrack import crash
from blktrack.config import Paths
from blktrack.point import Point
from blktrack.ship.endpoint import Endpoint, FileEnd
from blktrack.ship.header import LOST, Header, StageDamaged
from blktrack.ship.record import Origin, Record, Seal, State, edges
from blktrack.ship.target import Target
from blktrack.sysfs import boot_id

RECORD = "replica.json"
STATE = ".blktrack"  # after the name of a file: the folder of its state


class Place:
    """An open target that this run has for itself."""

    target: Target
    end: Endpoint  # where the bytes go
    folder: Path  # where its state is kept
    record: Record | None  # as found, then as last written; None: nothing of ours is there
    written: bool  # by this run: a record

    def __init__(self, target: Target, end: Endpoint, folder: Path) -> None:
        self.target = target
        self.end = end
        self.folder = folder
        self.record = None
        self.written = False

    def read(self) -> Record | None:
        """The record; `record` is as its user judges it."""
        return Record.read(self.folder / RECORD)

    def write(self, record: Record) -> None:
        record.write(self.folder / RECORD)
        self.record = record
        self.written = True

    def leave(
        self,
        link: str,
        source: Origin,
        state: State,
        point: Point | None,
        following: Point | None = None,
    ) -> None:
        """Record that the bytes leave `point`, then give a file the size of its source."""
        seal = self.seal(digest=False)
        self.write(Record(link, source, state, point, seal, following))
        crash.point("apply-recorded")
        if isinstance(self.end, FileEnd) and self.end.size != source.size:
            self.end.resize(source.size)
            crash.point("apply-resized")

    def arrive(self, link: str, source: Origin, point: Point) -> None:
        """Make the bytes durable, then record that they are at `point`."""
        self.end.flush()
        crash.point("commit-flushed")
        self.write(Record(link, source, State.READY, point, self.seal(digest=True)))

    def pause(self) -> None:
        """Record what a target at no point looks like when its run ends: others' writes to it are
        then noticed by the next. After a death they are not."""
        if self.written and self.record and self.record.state is not State.READY:
            self.end.flush()
            self.write(replace(self.record, seal=self.seal(digest=True)))

    def seal(self, *, digest: bool) -> Seal:
        """What the target looks like now."""
        sum_ = edges(self.end) if digest else ""
        if isinstance(self.end, FileEnd):
            return Seal.of_file(os.fstat(self.end.fileno()), sum_)
        assert self.target.device is not None
        return Seal.of_device(self.target.device, sum_)

    def changed(self, record: Record) -> str:
        """What happened to the target since `record` was written: a clause, "" if nothing."""
        return record.changed(self.seal(digest=bool(record.seal.digest)))


def folder_of(target: Target, paths: Paths) -> Path:
    """Where the state of a target is kept."""
    device = target.device
    if device is None:
        return Path(f"{target.path}{STATE}")
    name = device.permanent_name or f"{device.name}:{device.diskseq}:{boot_id()}"
    words = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:40]
    return paths.lib / "replicas" / f"{words}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def lock_of(folder: Path, paths: Paths) -> Path:
    """Held while a target device is in use."""
    return paths.run / "replicas" / f"{folder.name}.lock"


def inspect(name: str, paths: Paths) -> tuple[Record | None, str]:
    """The record of a target, None if it has none, and what seems to have happened to it since.

    A record that is READY and has a `next` is of a replica at its old point, for which an increment
    waits, complete: `finish`, or any sync, brings it to the next.

    Opens and locks nothing of the target, and so sees no more than sizes, times and counters.
    """
    target = Target.find(name)
    folder = folder_of(target, paths)
    record = Record.read(folder / RECORD)
    following = _waits(folder, record) if record else None
    if record is not None and record.next and not following:
        # A run that goes on may have finished it in between: its record comes first.
        record = Record.read(folder / RECORD)
    if record is None:
        return None, "" if target.exists else "it is gone"
    if not target.exists:
        return record, "it is gone"
    if target.device is not None:
        now = Seal.of_device(target.device, record.seal.digest)
    else:
        now = Seal.of_file(os.stat(target.path), record.seal.digest)
    change = record.changed(now)
    if record.next and not following:
        return record, change or LOST
    return record if change else replace(record, next=following), change


def _waits(folder: Path, record: Record) -> Point | None:
    """Where the increment leads that is sealed for a replica of this record."""
    with contextlib.suppress(StageDamaged):
        header = Header.read(folder)
        if header is not None and header.leads_from(record):
            return header.point
    return None
