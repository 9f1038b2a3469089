"""The replica store: what is refused, what is noticed, and what is on record after each step."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack import extent
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Busy, Refused, UsageError
from blktrack.point import Point
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import EndError, open_end
from blktrack.ship.place import inspect
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.ship.stack import below, unescape
from blktrack.ship.target import signature
from blktrack.sysfs import BlockDevice
from blktrack.units import MIB
from tests.loopdev import Disks, disks_in_memory, run

pytestmark = pytest.mark.needs("root", "loop")

SIZE = 8 * MIB
POINT = Point(7, "generation-1", 1700000000.5, "crash")
NEXT = Point(8, "generation-1", 1700000060.5, "none")


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


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# What cannot hold a replica of this source.


def test_remote_targets_are_for_later(store: Store) -> None:
    with pytest.raises(UsageError, match="remote replicas are not supported in this version"):
        store.open("ssh://host/replica")


def test_odd_targets(store: Store) -> None:
    folder = store.disks.folder
    error = store.refused(folder, "is a directory")
    assert f"{folder}/replica.img" in error.hint
    os.mkfifo(folder / "fifo")
    store.never(folder / "fifo", "is neither a block device nor a file")
    store.never("/dev/null", "is neither a block device nor a file")
    store.never(folder / "absent" / "replica", "No such file or directory")
    (folder / "plain").touch()
    store.never(folder / "plain" / "replica", "Not a directory")
    # A file made by a misspelt device name would fill memory.
    error = store.refused("/dev/blktrack-no-such-device", "does not exist")
    assert "lsblk" in error.hint
    assert not Path("/dev/blktrack-no-such-device").exists()


def test_the_source_itself(store: Store) -> None:
    store.never(store.source_path, "is the source itself")
    link = store.disks.folder / "by-another-name"
    link.symlink_to(store.source_path)
    store.never(link, "is the source itself")
    store.refused(link, "is the source itself", writable=False)


def partition(disk: Path, number: int, start: int, length: int) -> Path:
    run("addpart", disk, str(number), str(start // 512), str(length // 512))
    return Path(f"{disk}p{number}")


def test_disk_and_partition_of_the_source(store: Store) -> None:
    disk = store.disks.loop(4 * SIZE, options=("--partscan",))
    one = partition(disk, 1, MIB, SIZE)
    two = partition(disk, 2, MIB + SIZE, SIZE)
    source = BlockDevice.find(str(one))
    store.never(disk, "is the whole disk that the source", source=source)
    store.never(one, "is a partition of the source", source=BlockDevice.find(str(disk)))
    with store.open(two, source=source):
        pass


def test_two_loop_devices_over_one_file(store: Store) -> None:
    file = store.disks.name("shared")
    file.touch()
    os.truncate(file, 3 * SIZE)
    limit = f"--sizelimit={SIZE}"
    devices = [
        store.disks.loop(file=file, options=(limit, f"--offset={offset}"))
        for offset in (0, SIZE // 2, SIZE)
    ]
    source = BlockDevice.find(str(devices[0]))
    store.never(devices[1], "is a loop device over the same file", source=source)
    with store.open(devices[2], source=source):
        pass


@pytest.mark.needs("ext4")
def test_what_lies_on_the_source(store: Store) -> None:
    disk = store.disks.loop(64 * MIB)
    point = store.disks.mount(disk, "ext4")
    source = BlockDevice.find(str(disk))
    store.never(point / "replica", "lies on a file system that is on the source", source=source)
    assert list(point.glob("replica*")) == []
    (point / "folder").mkdir()
    (point / "image").touch()
    os.truncate(point / "image", SIZE)
    loop = store.disks.loop(file=point / "image")
    small = BlockDevice.find(str(loop))
    # A disk that its own file system's file is as large as: too small is no reason to look at here.
    assert [device.number for device in below(small)] == [source.number]
    store.never(loop, "lies on the source", source=source)
    store.never(disk, "holds the source", source=small)


def test_too_small(store: Store) -> None:
    store.never(store.disks.loop(SIZE - 512), r"is too small: .*\(8388096 bytes\) for a source of")
    store.accepted(store.disks.loop(SIZE + 512))


def test_blocks_that_cannot_take_every_change(store: Store) -> None:
    store.never(store.disks.loop(SIZE, sector=4096), "has blocks of 4096 bytes, the source of 512")
    source = BlockDevice.find(str(store.disks.loop(SIZE, sector=4096)))
    with store.open(store.disks.loop(SIZE), source=source):
        pass


@pytest.mark.needs("ext4")
def test_mounted(store: Store) -> None:
    disk = store.disks.loop(16 * MIB)
    point = store.disks.mount(disk, "ext4")
    store.never(disk, f"is mounted on {point}")
    with store.open(disk, writable=False) as replica:
        assert replica.record is None


@pytest.mark.needs("ext4")
def test_mounted_by_a_partition(store: Store) -> None:
    disk = store.disks.loop(32 * MIB, options=("--partscan",))
    point = store.disks.mount(partition(disk, 1, MIB, 16 * MIB), "ext4")
    store.never(disk, f"is mounted on {point}")


def test_held_by_another_program(store: Store) -> None:
    disk = store.disks.loop(SIZE)
    fd = os.open(disk, os.O_RDWR | os.O_EXCL)
    try:
        store.never(disk, "is in use: another program has it exclusively")
    finally:
        os.close(fd)
    store.accepted(disk)


@pytest.fixture
def swapped(store: Store) -> Callable[[Path], None]:
    def swap(path: Path) -> None:
        run("mkswap", path)
        run("swapon", path)
        store.disks.held.callback(run, "swapoff", path)

    if not Path("/proc/swaps").exists():
        pytest.skip("the kernel has no swap")
    return swap


def test_swap_device(store: Store, swapped: Callable[[Path], None]) -> None:
    disk = store.disks.loop(SIZE)
    swapped(disk)
    store.never(disk, rf"is used as swap \({disk}\)")


@pytest.mark.needs("ext4")
def test_swap_file(store: Store, swapped: Callable[[Path], None]) -> None:
    point = store.disks.mount(store.disks.loop(64 * MIB), "ext4")
    file = point / "swap file"
    file.write_bytes(bytes(SIZE))
    file.chmod(0o600)
    swapped(file)
    store.never(file, "is used as swap")


@pytest.mark.needs("ext4")
def test_read_only(store: Store) -> None:
    disk = store.disks.loop(64 * MIB)
    point = store.disks.mount(disk, "ext4")
    (point / "file").touch()
    run("chattr", "+i", point / "file")
    store.disks.held.callback(run, "chattr", "-i", point / "file")
    store.never(point / "file", "is read-only: Operation not permitted")
    run("mount", "-o", "remount,ro", point)
    store.never(point / "absent", "is read-only: Read-only file system")
    store.never(point / "file", "is read-only: Read-only file system")
    run("mount", "-o", "remount,rw", point)
    other = store.disks.loop(SIZE)
    run("blockdev", "--setro", other)
    # Otherwise the next file attached to this loop device would be read-only too.
    store.disks.held.callback(run, "blockdev", "--setrw", other)
    error = store.refused(other, "is read-only")
    assert f"blockdev --setrw {other}" in error.hint


def test_attached_to_a_loop_device(store: Store) -> None:
    file = store.disks.name("image")
    file.touch()
    os.truncate(file, SIZE)
    loop = store.disks.loop(file=file)
    store.never(file, f"is attached to {loop}")


# What holds something else.


@pytest.mark.needs("ext4", "sfdisk")
def test_signatures(store: Store) -> None:
    disk = store.disks.loop(16 * MIB)
    store.accepted(disk)
    for command, what in [
        (("mkfs.ext4", "-q", disk), r"carries a file system \(ext4\)"),
        (("mkswap", disk), r"carries a signature \(swap\)"),
        (("sfdisk", "-q", "--label-nested=dos", disk), r"carries a partition table \(dos\)"),
    ]:
        run("wipefs", "-a", disk)
        if command[0] == "sfdisk":
            script = "label: dos\nstart=2048\n"
            subprocess.run(["/sbin/sfdisk", "-q", disk], input=script, text=True, check=True)
        else:
            run(*command)
        error = store.refused(disk, what)
        assert "--force" in error.hint and f"wipefs -a {disk}" in error.hint
        store.accepted(disk, force=True)
        store.accepted(disk, writable=False)


def test_files_with_data(store: Store) -> None:
    file = store.disks.name("file")
    file.write_bytes(b"something else")
    store.refused(file, "is a file with data in it, and not a replica of")
    assert file.read_bytes() == b"something else", "looking changes nothing"
    with store.open(file, force=True) as replica:
        assert not replica.blank
        replica.begin(State.UNFINISHED, "g")
        assert file.stat().st_size == SIZE
    empty = store.disks.name("empty")
    empty.touch()
    with store.open(empty) as replica:
        assert replica.blank
    assert empty.exists(), "only what was created is removed"
    os.truncate(empty, 2 * SIZE)
    with store.open(empty) as replica:
        assert replica.blank
        replica.begin(State.UNFINISHED, "g")
        assert empty.stat().st_size == SIZE


def test_replica_of_another_source(store: Store) -> None:
    for target in (store.disks.name("replica"), store.disks.loop(SIZE)):
        store.make(target)
        other = BlockDevice.find(str(store.disks.loop(SIZE)))
        error = store.refused(target, f"is a replica of {store.source_path}", source=other)
        assert "--force" in error.hint
        store.refused(target, f"belongs to another link of {store.source_path}", link="link-2")
        with store.open(target, link="link-2", force=True) as replica:
            assert replica.link == "link-2"
            assert replica.record is None
            assert not replica.blank
            replica.begin(State.UNFINISHED, "g")
        store.refused(target, "belongs to another link", link="link-1")


def test_two_runs_do_not_meet(store: Store) -> None:
    for target in (store.disks.name("replica"), store.disks.loop(SIZE)):
        with store.open(target), pytest.raises(Busy, match="is held by another run"):
            store.open(target)
        store.accepted(target)


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


def test_names_as_the_kernel_writes_them() -> None:
    assert unescape(r"/mnt/a\040b\134c") == r"/mnt/a b\c"
    assert unescape("/mnt/é\\040") == "/mnt/é "
