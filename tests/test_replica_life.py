"""The life of a replica: what is on record after each step, and what is noticed behind our back."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from blktrack.errors import BlktrackError
from blktrack.point import Point
from blktrack.ship.endpoint import EndError, open_end
from blktrack.ship.place import inspect
from blktrack.ship.record import State
from blktrack.ship.target import signature
from blktrack.units import MIB
from tests.loopdev import disks_in_memory, run
from tests.replicas import POINT, SIZE, Store, store

__all__ = ["store"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop")

NEXT = Point(8, "generation-1", 1700000060.5, "none")


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# The life of a replica.


def test_life_of_a_file(store: Store) -> None:
    file = store.disks.folder / "sub" / "replica.img"
    file.parent.mkdir()
    with store.open(file) as replica:
        assert (replica.record, replica.changed, replica.blank) == (None, "", True)
        assert file.stat().st_size == SIZE
        assert file.stat().st_blocks == 0
        assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [], "what was not begun leaves nothing"
    assert inspect(str(file), store.paths)[0] is None

    with store.open(file) as replica:
        replica.begin(State.UNFINISHED, "g")
        replica.end.write(memoryview(b"half a copy"), 0)
    record = inspect(str(file), store.paths)[0]
    assert record is not None
    assert (record.state, record.point, record.link) == (State.UNFINISHED, None, "link-1")
    assert (record.source.device, record.source.size) == (str(store.source_path), SIZE)

    with store.open(file) as replica:
        assert replica.existing_state is State.UNFINISHED
        assert (replica.changed, replica.blank) == ("", False)
        with pytest.raises(ValueError, match="without a point"):
            replica.begin(State.APPLYING, "g")
        replica.commit(POINT)

    with store.open(file) as replica:
        assert replica.record is not None
        assert (replica.record.state, replica.record.point) == (State.READY, POINT)
        assert replica.changed == ""
        replica.begin(State.APPLYING, "g")
        replica.end.write(memoryview(b"half a delta"), 4096)
    with store.open(file) as replica:
        assert replica.record is not None
        assert (replica.record.state, replica.record.point) == (State.APPLYING, POINT)
        assert replica.changed == ""
        replica.begin(State.APPLYING, "g")
        replica.commit(NEXT)
    record = inspect(str(file), store.paths)[0]
    assert record is not None and record.point == NEXT
    # A link that is not known here goes on as the replica knows it, but with a doubt.
    with store.open(file, link=None) as replica:
        assert replica.link == "link-1"
        assert "not known" in replica.changed
    with store.open(store.disks.name("new"), link=None) as replica:
        assert len(replica.link) == 36
        assert replica.changed == ""


def test_life_of_a_device(store: Store) -> None:
    device = store.disks.loop(SIZE + MIB)
    with store.open(device) as replica:
        assert (replica.record, replica.blank) == (None, False)
    assert inspect(str(device), store.paths)[0] is None
    store.make(device)
    record = inspect(str(device), store.paths)[0]
    assert record is not None and record.point == POINT
    assert list((store.paths.lib / "replicas").glob("*/replica.json"))
    assert store.changed(device) == ""
    with store.open(device) as replica:
        replica.begin(State.APPLYING, "g")
        replica.end.zero(0, 4096)
        replica.commit(NEXT)
    assert store.changed(device) == ""
    with open_end(str(device)) as end:
        assert end.read(0, 8192) == bytes(4096) + b"\x5a" * 4096


def test_only_reading(store: Store) -> None:
    absent = store.disks.name("absent")
    store.refused(absent, "does not exist", writable=False)
    assert not absent.exists()
    short = store.disks.name("short")
    short.write_bytes(b"x" * MIB)
    store.refused(short, "is smaller than", writable=False)
    for target in (store.disks.name("replica"), store.disks.loop(SIZE)):
        store.make(target)
        with store.open(target, link="link-2", writable=False) as replica:
            assert replica.record is not None
            assert replica.record.link == "link-1"
            with pytest.raises(EndError) as caught:
                replica.end.write(memoryview(bytes(4096)), 0)
            assert caught.value.errno == errno.EBADF


def test_source_that_grew(store: Store) -> None:
    file = store.disks.name("replica")
    store.make(file)
    os.truncate(store.disks.folder / "disk1", SIZE + MIB)
    run("losetup", "--set-capacity", store.source_path)
    assert store.source.size == SIZE + MIB
    with store.open(file) as replica:
        assert replica.changed == ""
        replica.begin(State.UNFINISHED, "g")
        assert replica.end.size == file.stat().st_size == SIZE + MIB


def test_record_that_cannot_be_read(store: Store) -> None:
    file = store.disks.name("replica")
    store.make(file)
    path = Path(f"{file}.blktrack") / "replica.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "new key": 1}))
    assert store.changed(file) == ""
    for broken, why in [
        ({**value, "format": 2}, "newer blktrack"),
        ({**value, "state": "confused"}, "is damaged"),
        ({key: value[key] for key in value if key != "seal"}, "is damaged"),
    ]:
        path.write_text(json.dumps(broken))
        with pytest.raises(BlktrackError, match=why) as caught:
            store.open(file)
        assert caught.value.hint
    path.unlink()
    store.refused(file, "is a file with data in it")


# What happened behind our back.


def test_file_written_by_others(store: Store) -> None:
    file = store.disks.name("replica")
    store.make(file)
    assert store.changed(file) == ""
    poke(file, SIZE // 2, b"x")
    assert store.changed(file) == "it was written to by something else"
    store.make(file)
    assert store.changed(file) == ""
    os.truncate(file, SIZE + 512)
    assert "its size went from" in store.changed(file)


def test_file_replaced(store: Store) -> None:
    file = store.disks.name("replica")
    store.make(file)
    # A copy of the replica in its place is still the replica, but nothing vouches for its bytes.
    shutil.copy2(file, f"{file}.copy")
    os.rename(f"{file}.copy", file)
    assert "it was replaced" in store.changed(file)
    # Another file is not.
    file.unlink()
    file.write_bytes(b"precious" * MIB)
    store.refused(file, "is a file with data in it")
    # Nothing is as good as no replica.
    file.unlink()
    with store.open(file) as replica:
        assert (replica.record, replica.blank) == (None, True)


def test_unfinished_file_replaced(store: Store) -> None:
    file = store.disks.name("replica")
    with store.open(file) as replica:
        replica.begin(State.UNFINISHED, "g")
    # Made before the old one goes, so that it cannot get its inode.
    other = store.disks.name("other")
    other.write_bytes(b"precious" * MIB)
    os.rename(other, file)
    store.refused(file, "is a file with data in it")


def test_device_written_by_others(store: Store) -> None:
    device = store.disks.loop(SIZE)
    store.make(device)
    assert store.changed(device) == ""
    poke(device, SIZE // 2, b"x" * 512)
    assert store.changed(device) == "it was written to by something else"
    store.make(device)
    assert store.changed(device) == ""
    run("blkdiscard", "-f", "-o", str(MIB), "-l", str(MIB), device)
    assert store.changed(device) == "it was written to by something else"


def test_device_connected_anew(store: Store) -> None:
    file = store.disks.name("disk")
    file.touch()
    os.truncate(file, SIZE)
    device = run("losetup", "--find", "--show", file)
    try:
        store.make(device)
        assert store.changed(device) == ""
    finally:
        run("losetup", "-d", device)
    again = store.disks.loop(file=file)
    assert "connected anew" in store.changed(again)


def test_device_after_a_boot(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    device = store.disks.loop(SIZE)
    store.make(device)
    monkeypatch.setenv("BLKTRACK_BOOT_ID", "the next boot")
    assert store.changed(device) == ""
    poke(device, SIZE - 512, b"x")
    assert store.changed(device) == "its first or last bytes were changed by something else"


@pytest.mark.needs("ext4")
def test_replica_put_to_another_use(store: Store) -> None:
    run("mkfs.ext4", "-q", "-F", store.source_path)
    for target in (store.disks.loop(SIZE), store.disks.name("replica")):
        store.make(target)
        assert signature(str(target)) == signature(str(store.source_path))
        assert signature(str(target)).kind == "ext4"
        # Mounting it changes it, but it still is what we left there.
        with disks_in_memory() as other:
            device = target if target.is_block_device() else other.loop(file=target)
            point = other.attach(device, "ext4")
            (point / "file").write_text("changed on the replica")
        assert store.changed(target) != ""
        run("mkfs.ext4", "-q", "-F", target)
        error = store.refused(target, r"was a replica, but now carries a file system \(ext4\)")
        assert "--force" in error.hint
        with store.open(target, force=True) as replica:
            assert replica.changed != ""


@pytest.mark.needs("ext4")
def test_a_file_that_was_removed_and_made_anew(store: Store) -> None:
    """By us, with the inode of the one before, as ext4 has it: nothing of that copy is there."""
    file = store.disks.mount(store.disks.loop(64 * MIB), "ext4") / "replica.img"
    replica = store.open(file)
    replica.begin(State.UNFINISHED, "g")
    kept = file.with_name("replica.img.blktrack") / "replica.json"
    dead = kept.read_bytes()  # as a death leaves it
    replica.close()
    kept.write_bytes(dead)
    inode = file.stat().st_ino
    file.unlink()
    with store.open(file) as replica:
        assert file.stat().st_ino == inode
        assert replica.record is None
