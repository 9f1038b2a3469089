"""Staged increments: a replica is at the old point or at the new one, and what fits it when."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from blktrack import extent, linux
from blktrack.errors import Busy, CopyFailed, Refused
from blktrack.extent import from_pairs
from blktrack.ship.apply import ApplyStopped, finish
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.pack import ZERO
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.ship.stage import is_left
from blktrack.sysfs import BlockDevice
from blktrack.units import KIB, MIB
from tests.copies import content, patched
from tests.increments import KINDS, SIZE, Lab, every_kind, poke, some_kinds
from tests.loopdev import Disks, disks_in_memory
from tests.stager import LINK, bring, point

pytestmark = pytest.mark.needs("root", "loop")


@every_kind
def test_increments(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    for _ in range(7):
        new = lab.change()
        bring(lab.order)
        assert lab.holds(new)
        assert not is_left(lab.folder)
        record = lab.record()
        assert (record.state, record.point, record.next) == (
            State.READY,
            point(lab.order.epoch),
            None,
        )
        lab.old = new


@some_kinds
def test_nothing_changed_but_the_point(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    lab.change(extent.empty())
    bring(lab.order)
    assert lab.holds(lab.old)
    assert lab.record().point == point(1)


def test_a_source_that_grew_and_shrank(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    for size in (SIZE + 5 * MIB, SIZE - 3 * MIB):
        lab.resize(size)
        new = lab.change(from_pairs([(size - MIB, MIB), (4096, 512)]))
        lab.seal()
        assert lab.has_settled() == lab.order.epoch
        assert lab.target.stat().st_size == size
        assert lab.holds(new)
        assert lab.record().source.size == size
        lab.old = new


@pytest.mark.needs("xfs")
def test_blocks_are_shared(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "xfs", seed)
    extents = from_pairs([(0, 3 * MIB), (4 * MIB - 512, 3 * MIB + 1024)])
    lab.change(extents)
    lab.put(new := patched(lab.old, os.urandom(SIZE), extents))
    with lab.open() as replica, lab.staged(replica) as stage:
        os.link(stage.file.path, lab.home / "kept")  # its blocks are not freed with it
        before = free(lab.home)
        replica.apply(stage)
        used = before - free(lab.home)
    assert used < MIB // 2, "6 MiB of data took no space"
    assert lab.holds(new)


def free(path: Path) -> int:
    os.sync()
    room = os.statvfs(path)
    return room.f_bfree * room.f_bsize


@pytest.mark.needs("xfs")
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL])
def test_without_reflinks_it_is_copied(
    disks: Disks, seed: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that shows after some extents."""
    lab = Lab(disks, "xfs", seed)
    share = linux.clone_range
    for allowed in (0, 1, 2):
        left = [allowed]

        def clone(*arguments: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
            share(*arguments)

        monkeypatch.setattr(linux, "clone_range", clone)
        new = lab.change(from_pairs([(512, MIB), (3 * MIB, MIB), (5 * MIB, 2 * MIB)]), full=True)
        bring(lab.order)
        assert left[0] == -1
        assert lab.holds(new)
        lab.old = new


@pytest.mark.needs("xfs")
def test_a_file_system_that_fails_to_share(
    disks: Disks, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(disks, "xfs", seed)
    new = lab.change(from_pairs([(0, MIB)]), full=True)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(linux, "clone_range", full)
        with pytest.raises(CopyFailed, match=r"share blocks in .*: No space left"):
            bring(lab.order)
    record = lab.record()
    assert (record.state, record.point, record.next) == (State.APPLYING, point(0), point(1))
    assert lab.has_settled() == 1
    assert lab.holds(new)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_zeroes_become_holes(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    lab.put(os.urandom(SIZE))
    lab.old = content(lab.source)
    lab.order = dataclasses.replace(lab.order, extents=[[0, SIZE]], epoch=1)
    bring(lab.order)
    assert lab.holds(lab.old)
    full = lab.target.stat().st_blocks
    # In one round; then in a second one that overrides data of the first.
    zero = from_pairs([(MIB, 2 * MIB), (5 * MIB + 512, 40 * KIB)])
    lab.put(new := patched(lab.old, bytes(SIZE), zero))
    lab.order = dataclasses.replace(lab.order, extents=zero.tolist(), epoch=2)
    with lab.open() as replica, replica.stage() as stage, open_end(str(lab.source)) as source:
        copy(source, stage.end, zero)
        assert (stage.end.index()[:, 2] == ZERO).all()
        with open_end(str(lab.decoy)) as decoy:
            copy(decoy, stage.end, zero)
        assert (stage.end.index()[:, 2] != ZERO).any()
        copy(source, stage.end, zero)
        stage.seal(zero, point(2))
        assert (stage.index[:, 2] == ZERO).all()
        replica.apply(stage)
    assert lab.holds(new)
    assert lab.target.stat().st_blocks <= full - 2 * MIB // 512


# What does not fit.


@some_kinds
def test_a_replica_that_others_wrote_to(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    for how in ("in the same run", "by the next", "by finish"):
        lab.change()
        if how == "in the same run":
            with lab.open() as replica, lab.staged(replica) as stage:
                poke(lab.target)
                changed = lab.replica()
                with pytest.raises(Refused, match="not as it was left: it was written to"):
                    replica.apply(stage)
                assert "written to" in replica.changed
                with pytest.raises(ValueError, match="written to"):
                    replica.stage()
        else:
            lab.seal()
            poke(lab.target)
            changed = lab.replica()
            if how == "by finish":
                record = finish(str(lab.target), lab.order.paths)
                assert record is not None and record.point == point(lab.order.epoch - 1)
                assert not is_left(lab.folder)
            with lab.open() as replica:
                assert "written to" in replica.changed
                assert replica.finished is None
        assert not is_left(lab.folder)
        assert lab.holds(changed), "nothing was applied"
        lab.order.epoch -= 1
        with lab.open() as replica:  # a resync
            replica.begin(State.UNFINISHED, "generation-1")
            replica.commit(point(lab.order.epoch))


def test_what_may_be_staged_when(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    lab.change()
    with lab.open() as replica:
        with replica.stage() as stage:
            first = Path(stage.file.path)
            assert first.stat().st_size == 0
            for bad in ([(0, 0)], [(-512, 512)], [(SIZE - 512, 1024)], [(4096, 512), (0, 512)]):
                with pytest.raises(ValueError, match="extent"):
                    stage.seal(np.array(bad, dtype=np.int64), point(1))
            with pytest.raises(ValueError, match="not sealed"):
                replica.apply(stage)
        assert not is_left(lab.folder), "what is not sealed goes"
        with lab.staged(replica):
            pass
        assert is_left(lab.folder), "what is sealed stays"
        with replica.stage() as stage:
            assert stage.point is None
        assert not is_left(lab.folder)
        with lab.staged(replica):
            pass
        replica.begin(State.APPLYING, "generation-1")
        assert not is_left(lab.folder), "its point is left"
        with pytest.raises(ValueError, match="no point"):
            replica.stage()
        replica.begin(State.UNFINISHED, "generation-1")
        with pytest.raises(ValueError, match="no point"):
            replica.stage()


@every_kind
def test_a_stop_while_it_is_applied(disks: Disks, seed: int, kind: str) -> None:
    """Before the first block, and as often as one likes; then all of it is done."""
    lab = Lab(disks, kind, seed)
    new = lab.change(extents=from_pairs([(0, 4 * MIB), (5 * MIB, MIB)]))
    stop = threading.Event()
    stop.set()
    caught = pytest.raises(ApplyStopped, match="interrupted")
    with lab.open() as replica, lab.staged(replica) as stage, caught as error:
        replica.apply(stage, stop=stop)
    assert "the next sync finishes that first" in error.value.hint
    assert lab.holds(lab.old), "nothing was to be begun any more"
    source = BlockDevice.find(str(lab.source))
    for _ in range(2):
        record = lab.record()
        assert (record.state, record.point, record.next) == (State.APPLYING, point(0), point(1))
        with pytest.raises(ApplyStopped):
            Replica.open(
                str(lab.target), source=source, link=LINK, paths=lab.order.paths, stop=stop
            )
    stop.clear()
    with lab.open() as replica:
        assert replica.finished == point(1)
    assert lab.has_settled() == 1
    assert lab.holds(new)


@some_kinds
def test_a_stop_in_the_middle_of_it(disks: Disks, seed: int, kind: str) -> None:
    size = 64 * MIB
    lab = Lab(disks, kind, seed, size)
    new = lab.change(extents=from_pairs([(0, size)]))
    stop = threading.Event()

    def progress(count: int) -> None:
        if count:
            stop.set()

    with lab.open() as replica, lab.staged(replica) as stage, pytest.raises(ApplyStopped):
        replica.apply(stage, progress, stop)
    assert not lab.holds(lab.old) and not lab.holds(new)
    assert lab.has_settled() == 1
    assert lab.holds(new)


def test_finish_without_the_source(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    name, paths = str(lab.target), lab.order.paths
    new = lab.change()
    before = lab.target.stat()
    assert finish(name, paths) == lab.record()
    assert lab.target.stat().st_atime_ns == before.st_atime_ns, "not even opened"
    assert finish(str(lab.disks.name("none")), paths) is None
    lab.seal()
    record = lab.record()
    assert (record.state, record.point, record.next) == (State.READY, point(0), point(1))
    with open_end(name, writable=True), pytest.raises(Busy):
        finish(name, paths)
    with disks_in_memory() as other:
        device = other.loop(file=lab.target)
        with pytest.raises(Refused, match=f"attached to {device}"):
            finish(name, paths)
    assert lab.record().next == point(1)
    after = finish(name, paths)
    assert after == lab.record()
    assert (after.point, after.next) == (point(1), None)
    assert lab.holds(new)
    assert lab.has_settled() == 1


@some_kinds
def test_the_next_run_is_told(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    new = lab.change()
    lab.seal()
    with lab.open() as replica:
        assert replica.finished == point(1)
        assert replica.record is not None and replica.record.point == point(1)
        assert lab.holds(new)
    with lab.open() as replica:
        assert replica.finished is None
