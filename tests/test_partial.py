"""A stage that is kept: what it holds at a checkpoint, who goes on with it, and who drops it."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack import extent
from blktrack.errors import BlktrackError, Busy, CopyFailed
from blktrack.linux import PAGE, Buffer
from blktrack.ship.apply import finish
from blktrack.ship.copy import copy
from blktrack.ship.end import EndError
from blktrack.ship.endpoint import FileEnd, open_end
from blktrack.ship.pack import ROW, ZERO, Packer, TooMuchStaged, resolve
from blktrack.ship.record import Record, State
from blktrack.ship.replica import Replica
from blktrack.ship.stage import Stage, is_due, is_left
from blktrack.ship.tell import replica_status
from blktrack.sysfs import BlockDevice
from blktrack.units import KIB, MIB, SECTOR
from tests.blockdev import Lab as Host
from tests.increments import SIZE, Lab, every_kind, poke
from tests.kept import BASE, LINK, Kept, resume, state_of
from tests.loopdev import Disks
from tests.smallfs import full
from tests.stager import point
from tests.test_events import change, filled

loop = pytest.mark.needs("root", "loop")


def test_it_is_gone_on_with(tmp_path: Path, seed: int) -> None:
    kept = Kept(tmp_path / "replica", 4 * MIB, seed)
    first = kept.stage.id
    for _ in range(4):
        for _ in range(3):
            kept.write_some(10)
            kept.stage.checkpoint()
            assert state_of(kept.stage) == kept.state()
        kept.write_some(10)
        kept.stage.close()
        stage = kept.resume()
        assert stage is not None and stage.id == first
        kept.stage = stage
        assert state_of(stage) == kept.state(), "with what had no checkpoint when it was closed"
    kept.stage.drop()
    assert not is_left(kept.folder)
    assert kept.resume() is None
    another = Stage.create(kept.folder, kept.size, link=LINK, base=BASE, keep=True)
    assert another.id not in ("", first)
    another.drop()


def test_what_was_overridden_takes_no_room(tmp_path: Path, seed: int) -> None:
    """However often it is gone on with; what counts is as it was."""
    kept = Kept(tmp_path / "replica", 6 * MIB, seed)
    for _ in range(8):
        kept.write(int(kept.rng.integers(1, 3)) * MIB, 3 * MIB)
        kept.write_some(20)
        kept.stage.checkpoint()
        kept.stage.close()
        stage = kept.resume()
        assert stage is not None
        kept.stage = stage
        assert state_of(stage) == kept.state()
        taken = os.fstat(stage.file.fileno()).st_blocks * SECTOR
        assert taken < kept.size + 2 * MIB
    kept.drop()


def test_only_what_fits_is_gone_on_with(tmp_path: Path, seed: int) -> None:
    """Looking drops nothing."""
    kept = Kept(tmp_path / "replica", MIB, seed)
    kept.write_some()
    kept.stage.checkpoint()
    with pytest.raises(Busy):
        kept.resume()
    kept.stage.close()
    there = listing(kept.folder)
    for base in (dataclasses.replace(BASE, epoch=4), dataclasses.replace(BASE, generation="x")):
        assert Stage.resume(kept.folder, link=LINK, base=base, size=MIB) is None
    assert Stage.resume(kept.folder, link="link-2", base=BASE, size=MIB) is None
    assert resume(kept.folder, 2 * MIB) is None
    assert resume(tmp_path, MIB) is None
    assert listing(kept.folder) == there
    assert kept.resume() is not None


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_steps_of_a_checkpoint(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All data is durable before the journal speaks of it: with two flushes, however much it is."""
    kept = Kept(tmp_path / "replica", 64 * MIB, seed)
    steps: list[str] = []
    spied(monkeypatch, steps)
    for start in range(0, 32 * MIB, 8 * KIB):
        kept.stage.end.write(Buffer(PAGE).view, start)
    assert set(steps) == {"pwritev incoming.pack"}
    steps.clear()
    kept.stage.checkpoint()
    assert steps == [
        "pwritev incoming.pack",  # what waited
        "fdatasync incoming.pack",
        "write incoming.part",
        "fdatasync incoming.part",
    ]
    assert extent.total(kept.stage.staged) == 4096 * PAGE
    steps.clear()
    kept.stage.checkpoint()
    assert steps == [], "there is nothing new"
    kept.stage.drop()


def spied(patch: pytest.MonkeyPatch, steps: list[str]) -> None:
    """List the calls that write to a file or flush one."""

    def spy(name: str, call: Callable[..., int | None]) -> None:
        def spying(fd: int, *others: object) -> int | None:
            steps.append(f"{name} {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
            return call(fd, *others)

        patch.setattr(os, name, spying)

    for name in ("write", "pwritev", "fsync", "fdatasync"):
        spy(name, getattr(os, name))


def test_zeroes_override_what_waits(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.touch()
    packer = Packer(FileEnd(str(pack), writable=True), MIB)
    packer.write(Buffer(2 * PAGE).view, 0)
    packer.zero(0, PAGE)
    rows, packed = packer.settle(0)
    assert resolve(rows).tolist() == [[0, PAGE, ZERO], [PAGE, PAGE, PAGE]]
    assert packed == 2 * PAGE
    packer.close()


@pytest.mark.parametrize("number", [1, 2])
def test_a_checkpoint_that_fails(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Of the pack or of the journal: what was kept before it stays, and nothing more is."""
    kept = Kept(tmp_path / "replica", MIB, seed)
    kept.write_some()
    kept.stage.checkpoint()
    known, there = kept.state(), len((kept.folder / "incoming.part").read_bytes())
    kept.write_some()
    left, flush = [number], os.fdatasync

    def fail(fd: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(fd)

    monkeypatch.setattr(os, "fdatasync", fail)
    what = "flush .*incoming.pack" if number == 1 else "write .*incoming.part"
    for _ in range(2):
        with pytest.raises(CopyFailed, match=f"cannot {what}: Input/output error") as caught:
            kept.stage.checkpoint()
        assert "kernel log" in caught.value.hint
    with pytest.raises(CopyFailed):
        kept.stage.seal(kept.covered, BASE)
    assert kept.stage.staged.tolist() == known[0]
    kept.stage.close()
    if number == 2:
        os.truncate(kept.folder / "incoming.part", there)  # as if it had not come there
    stage = kept.resume()
    assert stage is not None
    with stage:
        assert state_of(stage) == known


def test_a_journal_that_cannot_be_resumed(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tmp_path / "replica", MIB, seed)
    kept.write_some()
    kept.stage.close()

    def fail(fd: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(EndError, match=r"cannot resume .*incoming.part: Read-only") as caught:
            kept.resume()
    assert caught.value.hint == "make it writable"
    stage = kept.resume()
    assert stage is not None, "nothing is held by who failed"
    stage.drop()


def test_what_has_no_checkpoint(tmp_path: Path, seed: int) -> None:
    stage = Stage.create(tmp_path / "replica", MIB, link=LINK, base=BASE)
    assert stage.id == ""
    with pytest.raises(ValueError, match="not kept"):
        stage.checkpoint()
    stage.close()
    assert not is_left(tmp_path / "replica")
    kept = Kept(tmp_path / "replica", MIB, seed)
    kept.write_some()
    kept.stage.seal(kept.covered, point(4))
    with pytest.raises(ValueError, match="is sealed"):
        kept.stage.checkpoint()
    kept.stage.close()
    assert kept.resume() is None, "its header decides"
    assert is_due(kept.folder)


def test_a_stage_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(BlktrackError, match=r"cannot make .*incoming.pack: No space left"):
        Stage.create(tmp_path / "replica", MIB, link=LINK, base=BASE, keep=True)
    assert not is_left(tmp_path / "replica")


@pytest.mark.needs("root")
def test_a_disk_that_fills_up(disks: Disks, seed: int) -> None:
    """What was taken and could not be written is not kept; with room it goes on."""
    room = disks.attach(None, "tmpfs", "-o", "size=1m")
    kept = Kept(room / "replica", 8 * MIB, seed)
    disks.held.callback(kept.drop)  # before it is unmounted
    kept.write(0, 64 * KIB)
    kept.zero(128 * KIB, 64 * KIB)
    kept.stage.checkpoint()
    known = kept.state()
    kept.stage.end.write(Buffer(PAGE).view, 0)  # it waits
    with full(room):
        with pytest.raises(EndError, match="No space left"):
            kept.stage.checkpoint()
        kept.stage.close()
    stage = kept.resume()
    assert stage is not None
    kept.stage = stage
    assert state_of(stage) == known
    kept.write(32 * KIB, 64 * KIB)
    stage.checkpoint()
    assert state_of(stage) == kept.state()


@pytest.mark.parametrize("how", ["small", "large", "zero"])
def test_no_more_than_it_may_take(tmp_path: Path, seed: int, how: str) -> None:
    """What was taken before is kept, and goes on where more is allowed."""
    length = {"small": PAGE, "large": 300 * KIB, "zero": PAGE}[how]
    took = ROW + (length if how != "zero" else 0)
    most = 20 * took + took // 2
    kept = Kept(tmp_path / "replica", 16 * MIB, seed, most)
    write = kept.zero if how == "zero" else kept.write
    for number in range(20):
        write(number * 2 * length, length)
    with pytest.raises(TooMuchStaged, match=r"larger than the .* that it may be") as caught:
        write(40 * length, length)
    assert "--max-staging" in caught.value.hint and "--in-place" in caught.value.hint
    kept.stage.checkpoint()
    kept.stage.close()
    for allowed in (most, most + took, None):
        stage = kept.resume(allowed)
        assert stage is not None
        with stage:
            kept.stage = stage
            assert state_of(stage) == kept.state()
            if allowed == most:
                with pytest.raises(TooMuchStaged):
                    write(0, length)
            else:
                write(0, length)


def begun(lab: Lab, part: slice) -> str:
    """Begin a stage that is kept, or go on with it; its id."""
    with lab.open() as replica, replica.partial() or replica.stage(keep=True) as stage:
        with open_end(str(lab.source)) as source:
            copy(source, stage.end, lab.extents[part])
        stage.checkpoint()
        return stage.id


@loop
@every_kind
def test_an_increment_in_parts(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    new = lab.change()
    assert begun(lab, slice(0, None, 3)) == begun(lab, slice(1, None, 3))
    assert lab.holds(lab.old)
    with lab.open() as replica, open_end(str(lab.source)) as source:
        assert replica.finished is None
        stage = replica.partial()
        assert stage is not None
        with stage:
            copy(source, stage.end, lab.extents[2::3])
            stage.seal(lab.extents, point(1))
            replica.apply(stage)
    assert lab.has_settled() == 1
    assert lab.holds(new)


@loop
def test_it_is_left_alone(disks: Disks, seed: int) -> None:
    """By all who look at its replica, or open it to write."""
    lab = Lab(disks, "tmpfs", seed)
    lab.change()
    name, paths = str(lab.target), lab.order.paths
    begun(lab, slice(0, None, 2))
    before = listing(lab.folder)
    with FileEnd(name, writable=True):  # nobody could take it
        record = finish(name, paths)
        assert record == lab.record() and record.next is None
        status = replica_status(name, paths)
    assert status is not None
    assert (status.state, status.reason, status.next_epoch) == ("ready", "", None)
    with lab.open() as replica:
        assert replica.finished is None and not replica.changed
    assert listing(lab.folder) == before
    assert is_left(lab.folder) and not is_due(lab.folder)
    # Anything else that is not sealed is dropped by the same.
    (lab.folder / "incoming.part").unlink()
    assert is_due(lab.folder)
    finish(name, paths)
    assert not is_left(lab.folder)


@loop
@pytest.mark.parametrize("how", ["moved", "back", "changed", "begun", "staged"])
def test_it_goes_when_its_point_is_left(disks: Disks, seed: int, how: str) -> None:
    lab = Lab(disks, "tmpfs", seed)
    lab.change()
    begun(lab, slice(0, None, 2))
    path, record = lab.folder / "replica.json", lab.record()
    match how:
        case "moved":
            dataclasses.replace(record, point=point(7)).write(path)
        case "back":
            dataclasses.replace(record, state=State.UNFINISHED, point=None).write(path)
        case "changed":
            poke(lab.target)
    if how in ("moved", "back"):
        finish(str(lab.target), lab.order.paths)
        assert is_left(lab.folder), "nothing is taken for that"
    with lab.open() as replica:
        match how:
            case "begun":
                replica.begin(State.APPLYING, "generation-1")
            case "staged":
                replica.stage().close()
        assert replica.partial() is None
        assert not is_left(lab.folder)


@loop
def test_a_source_of_another_size(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    lab.change()
    first = begun(lab, slice(0, None, 2))
    lab.resize(SIZE + 5 * MIB)
    with lab.open() as replica:
        assert is_left(lab.folder)
        assert replica.partial() is None
        with replica.stage(keep=True) as stage:
            assert stage.id != first
            stage.drop()
    assert not is_left(lab.folder)


@pytest.mark.needs("root", "loop", "bpf")
def test_a_local_sync_drops_it(shared: Host) -> None:
    device, replica = filled(shared, 4 * MIB), str(shared.name("replica"))
    shared.track(device)
    shared.sync(device, replica)
    change(device, MIB)
    folder = Path(f"{replica}.blktrack")
    record = Record.read(folder / "replica.json")
    assert record is not None
    source, paths = BlockDevice.find(device), shared.store.paths
    opened = Replica.open(replica, source=source, link=record.link, paths=paths)
    with opened, opened.stage(keep=True) as stage:
        stage.end.write(Buffer(PAGE).view, 0)
    before = listing(folder)
    assert "incoming.part" in before
    assert "ready" in shared.blktrack("status", replica).out
    assert listing(folder) == before
    report = shared.sync(device, replica)
    assert report.mode == "incremental"
    assert not is_left(folder)
