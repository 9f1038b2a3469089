"""A replica at a point, increments that bring it on, and where a process on the way can die."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blktrack.extent import ExtentArray, from_pairs
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.place import inspect
from blktrack.ship.record import Record, State
from blktrack.ship.replica import Replica
from blktrack.ship.stage import Stage, is_left
from blktrack.units import MIB
from tests.blockdev import flush
from tests.copies import content, image, patched, random_extents, whole
from tests.crash_points import crash_points
from tests.loopdev import Disks
from tests.stager import TOP, Order, open_replica, point

SIZE = 8 * MIB


class Lab:
    """A source, a replica of it at a point, and increments between them."""

    def __init__(self, disks: Disks, kind: str, seed: int, size: int = SIZE) -> None:
        self.disks, self.kind, self.size = disks, kind, size
        self.rng = np.random.default_rng(seed)
        self.unit = 4096 if kind == "4k" else 512
        self.source = disks.loop(size, sector=self.unit)
        self.decoy = disks.name("decoy")
        self.decoy.write_bytes(image(self.rng, size, 0.1))
        self.home = disks.folder
        match kind:
            case "ext4":
                self.home = disks.mount(disks.loop(4 * size + 16 * MIB), "ext4")
            case "xfs":
                self.home = disks.mount(disks.loop(512 * MIB), "xfs")
        on_device = kind in ("512", "4k")
        self.target = disks.loop(size, sector=self.unit) if on_device else self.home / "replica"
        self.order = Order(
            "apply", str(disks.folder), str(self.target), str(self.source), str(self.decoy), [], 0
        )
        self.put(image(self.rng, size))
        with self.open() as replica, open_end(str(self.source)) as source:
            replica.begin(State.UNFINISHED, point(0).generation)
            copy(source, replica.end, whole(size))
            replica.commit(point(0))
        self.old = self.replica()

    def put(self, data: bytes | bytearray) -> None:
        with open(self.source, "r+b") as file:
            file.write(data)
        flush(str(self.source))

    def open(self) -> Replica:
        return open_replica(self.order)

    def replica(self) -> bytes:
        if self.target.is_block_device():
            flush(str(self.target))
        return content(self.target)[: self.size]

    def holds(self, expected: bytes) -> bool:
        """Asked this way, a test that fails does not compare megabytes line by line."""
        return self.replica() == expected

    @property
    def folder(self) -> Path:
        if not self.target.is_block_device():
            return Path(f"{self.target}.blktrack")
        (found,) = (self.disks.folder / "lib" / "replicas").iterdir()
        return found

    def change(self, extents: ExtentArray | None = None, *, full: bool = False) -> bytes:
        """The source changes, without zeroes if `full`; what the replica is at its next point."""
        if extents is None:
            extents = random_extents(self.rng, self.size, self.unit)
        data = self.rng.bytes(self.size) if full else image(self.rng, self.size)
        new = patched(self.old, data, extents)
        self.put(new)
        self.order = dataclasses.replace(
            self.order, extents=extents.tolist(), epoch=self.order.epoch + 1
        )
        return new

    def resize(self, size: int) -> None:
        """The source has another size, and the end of what it grew by is zero."""
        self.source = self.disks.loop(size)
        self.order.source = str(self.source)
        os.truncate(self.decoy, size)
        # The source is known again by its path alone.
        record = Record.read(self.folder / "replica.json")
        assert record is not None
        same = dataclasses.replace(record.source, device=str(self.source), name="")
        dataclasses.replace(record, source=same).write(self.folder / "replica.json")
        self.old = self.old[:size] + bytes(max(size - len(self.old), 0))
        self.size = size

    @property
    def extents(self) -> ExtentArray:
        return from_pairs([(start, length) for start, length in self.order.extents])

    @contextlib.contextmanager
    def staged(self, replica: Replica) -> Iterator[Stage]:
        """A sealed stage of the last change."""
        with replica.stage() as stage, open_end(str(self.source)) as source:
            copy(source, stage.end, self.extents)
            stage.seal(self.extents, point(self.order.epoch))
            yield stage

    def seal(self) -> None:
        """Seal it and do not apply it, as by a death."""
        with self.open() as replica, self.staged(replica):
            pass

    def record(self) -> Record:
        record, change = inspect(str(self.target), self.order.paths)
        assert record is not None and not change
        return record

    def has_settled(self) -> int:
        """Open the replica as the next sync would; the epoch that it is at then."""
        with self.open() as replica:
            assert replica.changed == ""
            record = replica.record
        assert record is not None and record.state is State.READY and record.point is not None
        assert not is_left(self.folder)
        return record.point.epoch


KINDS = [
    "tmpfs",
    pytest.param("ext4", marks=pytest.mark.needs("ext4")),
    pytest.param("xfs", marks=pytest.mark.needs("xfs")),
    "512",
    "4k",
]
every_kind = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize("kind", ["tmpfs", "512"])

# Those of a keeper are for test_keeper.py.
POINTS = [name for name in crash_points(TOP / "blktrack/ship") if not name.startswith("serve-")]
RESIZED = "apply-resized"  # where the source has another size than before
NEVER = ("copy-flushed", "copy-checkpoint")  # of a copy that is not staged
KEPT = [name for name in POINTS if name.startswith("part-")]  # of a stage that is made to be kept
ON_THE_WAY = [name for name in POINTS if name not in (RESIZED, *NEVER, *KEPT)]
FILES = [f"file-{step}:{turn}" for step in ("written", "renamed") for turn in range(1, 5)]


def poke(path: Path, offset: int = 3 * MIB) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(os.urandom(512))
        file.flush()
        os.fsync(file.fileno())
