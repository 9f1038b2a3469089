"""Targets of the replica store: what cannot hold a replica, and what holds something else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.errors import Busy, UsageError
from blktrack.ship.record import State
from blktrack.ship.stack import below
from blktrack.sysfs import BlockDevice, unescape
from blktrack.units import MIB
from tests.loopdev import run
from tests.replicas import SIZE, Store, store

__all__ = ["store"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop")


# What cannot hold a replica of this source.


def test_a_target_elsewhere_is_no_place_here(store: Store) -> None:
    with pytest.raises(UsageError, match="ssh://host/replica is on another host"):
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


def test_names_as_the_kernel_writes_them() -> None:
    assert unescape(r"/mnt/a\040b\134c") == r"/mnt/a b\c"
    assert unescape("/mnt/é\\040") == "/mnt/é "
