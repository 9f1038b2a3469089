"""A source, and replicas opened for it: what is refused, and what a replica is left as."""

from __future__ import annotations

from pathlib import Path

import pytest

from blktrack import extent
from blktrack.config import Paths
from blktrack.errors import Refused
from blktrack.point import Point
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.sysfs import BlockDevice
from blktrack.units import MIB
from tests.loopdev import Disks

SIZE = 8 * MIB
POINT = Point(7, "generation-1", 1700000000.5, "crash")


class Store:
    """A source of SIZE bytes, and replicas opened for it."""

    def __init__(self, disks: Disks) -> None:
        self.disks = disks
        base = disks.folder
        self.paths = Paths(base / "pins", base / "run", base / "lib", base / "policy")
        self.source_path = disks.loop(SIZE)
        self.source_path.write_bytes(b"\x5a" * SIZE)
        self.source = BlockDevice.find(str(self.source_path))

    def open(
        self,
        target: Path | str,
        *,
        source: BlockDevice | None = None,
        link: str | None = "link-1",
        force: bool = False,
        writable: bool = True,
    ) -> Replica:
        return Replica.open(
            str(target),
            source=source or self.source,
            link=link,
            paths=self.paths,
            force=force,
            writable=writable,
        )

    def refused(
        self, target: Path | str, why: str, *, source: BlockDevice | None = None,
        link: str | None = "link-1", force: bool = False, writable: bool = True,
    ) -> Refused:  # fmt: skip
        """The refusal, whose sentence names the target and matches, with a way out."""
        with pytest.raises(Refused, match=why) as caught:
            self.open(target, source=source, link=link, force=force, writable=writable).close()
        assert str(target) in str(caught.value)
        assert caught.value.hint
        return caught.value

    def never(self, target: Path | str, why: str, *, source: BlockDevice | None = None) -> None:
        """Refused, and --force does not help."""
        self.refused(target, why, source=source)
        self.refused(target, why, source=source, force=True)

    def accepted(self, target: Path | str, *, force: bool = False, writable: bool = True) -> None:
        with self.open(target, force=force, writable=writable) as replica:
            assert replica.end.size >= SIZE

    def make(self, target: Path | str) -> None:
        """A replica that is at POINT."""
        with self.open(target) as replica, open_end(str(self.source_path)) as source:
            replica.begin(State.UNFINISHED, POINT.generation)
            copy(source, replica.end, extent.from_pairs([(0, SIZE)]))
            replica.commit(POINT)

    def changed(self, target: Path | str) -> str:
        with self.open(target) as replica:
            assert replica.record is not None
            return replica.changed


@pytest.fixture
def store(disks: Disks) -> Store:
    return Store(disks)
