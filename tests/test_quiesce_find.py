"""Which file systems a freeze is of: those on a device, and what is mounted meanwhile."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from blktrack import linux, sysfs
from blktrack.errors import NoPoint, Refused
from blktrack.quiesce import find
from blktrack.quiesce.find import FileSystem, file_systems
from blktrack.quiesce.freeze import Freeze
from blktrack.sysfs import BlockDevice
from tests.blockdev import Lab, run, wait_until
from tests.freezes import SIZE, Load, Mounted, assert_thawed, ext4, mount, not_entered
from tests.test_sysfs import Tree
from tests.workload import make_filesystem

__all__ = ["ext4"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop", "ext4")


def is_frozen(point: Path) -> bool:
    fd = os.open(point, os.O_RDONLY)
    try:
        linux.freeze(fd)
    except OSError as error:
        assert error.errno == errno.EBUSY
        return True
    else:
        linux.thaw(fd)
        return False
    finally:
        os.close(fd)


# Mounted meanwhile


class Mounting:
    """Lists the file systems of a disk with two partitions, and mounts one of them after some."""

    def __init__(self, lab: Lab, at: Sequence[int]) -> None:
        disk = lab.loop(2 * SIZE)
        self.parts = [lab.partition(disk, n, (n - 1) * SIZE, SIZE) for n in (1, 2)]
        for part in self.parts:
            make_filesystem(part, "ext4")
        self.first = mount(lab, self.parts[0])
        self.lab, self.at, self.device = lab, at, BlockDevice.find(disk)
        self.listings = 0
        self.other = lab.name("mount")
        self.other.mkdir()

    def __call__(self) -> list[FileSystem]:
        found = file_systems(self.device)
        self.listings += 1
        if self.listings in self.at:
            self.mount()
        return found

    def mount(self) -> None:
        run("mount", self.parts[1], self.other)
        self.lab.stack.callback(run, "umount", self.other)

    def assert_thawed(self) -> None:
        assert not is_frozen(self.first) and not is_frozen(self.other)


def test_a_mount_by_a_pre_hook(lab: Lab) -> None:
    disk = Mounting(lab, at=())
    pre = [f"mount {disk.parts[1]} {disk.other}"]
    with Freeze(disk.device, disk, pre=pre, post=[f"umount {disk.other}"]) as freeze:
        assert {one.points[0] for one in freeze.file_systems} == {disk.first, disk.other}
        assert is_frozen(disk.first) and is_frozen(disk.other)
    assert freeze.warnings == []
    (left,) = file_systems(disk.device)
    assert left.points == (disk.first,)


def test_a_mount_after_the_listing(lab: Lab) -> None:
    """It is found once the first is frozen, and then both are."""
    disk = Mounting(lab, at=[1])
    log = lab.name("log")
    with Freeze(disk.device, disk, post=[f"echo post >> {log}"]) as freeze:
        assert {one.points[0] for one in freeze.file_systems} == {disk.first, disk.other}
        assert is_frozen(disk.first) and is_frozen(disk.other)
        assert not log.exists()
    assert disk.listings == 5  # before and under the first freeze and the second, and after
    assert log.read_text() == "post\n"
    disk.assert_thawed()


def test_mounts_without_end(lab: Lab) -> None:
    disk = Mounting(lab, at=())
    disk.mount()

    def listing() -> list[FileSystem]:
        """As if it were unmounted under each freeze, and mounted again before the next."""
        found = disk()
        return (
            found if disk.listings % 2 == 0 else [one for one in found if disk.first in one.points]
        )

    freeze = Freeze(disk.device, listing)
    not_entered(freeze, NoPoint, f"not frozen: the ext4 at {disk.other}")
    assert disk.listings == 4
    disk.assert_thawed()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_mount_under_the_freeze(lab: Lab, frozen: bool) -> None:
    """Where nothing was mounted, and so nothing frozen, too."""
    disk = Mounting(lab, at=())
    log = lab.name("log")
    with contextlib.ExitStack() as stack:
        if not frozen:
            device = BlockDevice.find(disk.parts[1])
            freeze = Freeze(device, functools.partial(file_systems, device))
        else:
            freeze = Freeze(disk.device, disk, post=[f"echo post >> {log}"])
        stack.enter_context(pytest.raises(NoPoint, match=f"the ext4 at {disk.other}"))
        stack.enter_context(freeze)
        disk.mount()
    assert log.exists() == frozen
    disk.assert_thawed()


# Which file systems


def test_disk_and_partitions(lab: Lab) -> None:
    disk = lab.loop(2 * SIZE)
    parts = [Mounted(lab, device=lab.partition(disk, n, (n - 1) * SIZE, SIZE)) for n in (1, 2)]
    for part in parts:
        (found,) = file_systems(part.device)
        assert (found.kind, found.points) == ("ext4", (part.point,))
    whole = BlockDevice.find(disk)
    listing = functools.partial(file_systems, whole)
    assert [one.points[0] for one in file_systems(whole)] == [part.point for part in parts]
    with Load(parts[0].point), Load(parts[1].point), Freeze(whole, listing):
        before = [part.writes for part in parts]
        time.sleep(0.1)
        assert [part.writes for part in parts] == before
    for part in parts:
        assert_thawed(part)


def test_a_loop_device_on_the_device(lab: Lab) -> None:
    lower = lab.loop(SIZE)
    upper = Mounted(lab, device=lab.loop(SIZE, file=Path(lower)))
    (found,) = file_systems(BlockDevice.find(lower))
    assert found.points == (upper.point,)


def test_two_mounts_of_one(lab: Lab, ext4: Mounted) -> None:
    second = mount(lab, ext4.path)
    (found,) = file_systems(ext4.device)
    assert found.points == (ext4.point, second)
    with lab.mounted("tmpfs", "-t", "tmpfs"):
        run("mount", "-t", "tmpfs", "tmpfs", ext4.point)
        lab.stack.callback(run, "umount", ext4.point)
        with ext4.freeze():
            before = ext4.writes
        run("mount", "-t", "tmpfs", "tmpfs", second)
        lab.stack.callback(run, "umount", second)
        not_entered(ext4.freeze(), Refused, "cannot be reached")
    assert ext4.writes >= before


def test_read_only(lab: Lab) -> None:
    path = lab.loop(SIZE)
    make_filesystem(path, "ext4")
    device = BlockDevice.find(path)
    assert file_systems(device) == []
    with lab.mounted(path, "-o", "ro"):
        assert file_systems(device) == []
    with lab.mounted(path) as point:
        # The mount is, the file system is not.
        run("mount", "-o", "remount,bind,ro", point)
        assert [one.points for one in file_systems(device)] == [(point,)]
        with Freeze(device, functools.partial(file_systems, device)) as freeze:
            pass
        assert freeze.seconds > 0


def test_mounted_in_another_namespace(lab: Lab) -> None:
    path, point = lab.loop(SIZE), lab.name("mount")
    point.mkdir()
    make_filesystem(path, "ext4")
    device = BlockDevice.find(path)
    script = f"mount {path} {point} && echo mounted && read end"
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout and other.stdout.readline() == "mounted\n"
        with pytest.raises(Refused, match=f"process {other.pid}, at {point}"):
            file_systems(device)
        with lab.mounted(path) as here:
            assert [one.points for one in file_systems(device)] == [(here,)]
    finally:
        other.communicate("\n")
    wait_until(lambda: not find._in_use_by(device), "the end of the other mount")
    assert file_systems(device) == []


def test_mounted_nowhere_to_be_seen(lab: Lab) -> None:
    path = lab.loop(SIZE)
    make_filesystem(path, "ext4")
    device = BlockDevice.find(path)
    point = lab.name("mount")
    point.mkdir()
    run("mount", path, point)
    with (point / "file").open("wb"):
        run("umount", "--lazy", point)
        with pytest.raises(Refused, match="no process shows it"):
            file_systems(device)
    wait_until(lambda: not find._in_use_by(device), "the end of the mount")
    assert file_systems(device) == []


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A made-up sysfs and procfs, for devices that not every machine has."""
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/mnt").touch()
    (tmp_path / "proc/self/root").symlink_to("/")
    monkeypatch.setattr(sysfs, "SYSFS", tmp_path)
    monkeypatch.setattr(find, "SYSFS", tmp_path)
    monkeypatch.setattr(find, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(sysfs, "MOUNTINFO", tmp_path / "mountinfo")
    (tmp_path / "class/block").mkdir(parents=True)
    return Tree(tmp_path)


def test_a_volume_on_a_partition(tree: Tree) -> None:
    disk = tree.disk("sda", "8:0", 4096)
    part = tree.partition(disk, "sda1", "8:1", 63, 1000)
    volume = tree.disk("dm-0", "253:0", 900)
    (tree.root / "class/block/dm-0").symlink_to(volume)
    (part / "holders/dm-0").symlink_to(volume)
    other = tree.partition(disk, "sda2", "8:2", 2000, 1000)
    (tree.root / "mountinfo").write_text(
        "30 1 253:0 / /srv rw - xfs /dev/mapper/vg-lv rw,attr2\n"
        "31 1 0:40 / /net rw - nfs4 host:/dev/sda1 rw\n"
    )
    assert [one.points for one in file_systems(BlockDevice.of_number(8, 1))] == [(Path("/srv"),)]
    assert [one.kind for one in file_systems(BlockDevice.of_number(8, 0))] == ["xfs"]
    assert file_systems(BlockDevice.of_number(8, 2)) == []
    assert other.exists()


def test_btrfs_of_several_devices(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"/dev/sdb": (8, 16), "/dev/sdc": (8, 32)}
    monkeypatch.setattr(find, "stack", SimpleNamespace(device_number=numbers.get))
    members = tree.root / "fs/btrfs/0a1b-2c/devices"
    members.mkdir(parents=True)
    for name, number in (("sdb", "8:16"), ("sdc", "8:32")):
        (members / name).symlink_to(tree.disk(name, number, 4096))
    (tree.root / "mountinfo").write_text(
        "30 1 0:50 /home /home rw - btrfs /dev/sdb rw,subvol=/home\n"
        "31 1 0:50 / /all ro - btrfs /dev/sdb rw,subvol=/\n"
    )
    (found,) = file_systems(BlockDevice.of_number(8, 32))
    assert found == FileSystem(
        "0:50", "btrfs", (Path("/home"), Path("/all")), frozenset(numbers.values())
    )
    (tree.root / "mountinfo").write_text("")
    with pytest.raises(Refused, match="btrfs on sdc"):
        file_systems(BlockDevice.of_number(8, 32))
