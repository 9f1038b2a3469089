"""What sysfs says of block devices: against a made-up tree, and of real disks against the tools."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack import sysfs
from blktrack.errors import UsageError
from blktrack.sysfs import BlockDevice
from tests.needs import TOOL_PATH

MIB = 1 << 20


def run(*command: str | Path) -> str:
    environment = {**os.environ, "PATH": TOOL_PATH}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout.strip()


class Tree:
    """A sysfs of disks and partitions, laid out as the kernel's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dev/block").mkdir(parents=True)
        (root / "block").mkdir()

    def disk(self, name: str, number: str, sectors: int, **attributes: str) -> Path:
        folder = self._device(f"devices/virtual/block/{name}", number, sectors)
        (self.root / "block" / name).symlink_to(folder)
        self.write(folder, {"queue/logical_block_size": "512", "inflight": "       3        4"})
        self.write(folder, attributes)
        return folder

    def partition(self, disk: Path, name: str, number: str, start: int, sectors: int) -> Path:
        folder = self._device(f"{disk.relative_to(self.root)}/{name}", number, sectors)
        self.write(folder, {"partition": name[-1], "start": str(start), "inflight": "0 0"})
        return folder

    def _device(self, path: str, number: str, sectors: int) -> Path:
        folder = self.root / path
        (folder / "holders").mkdir(parents=True)
        self.write(folder, {"dev": number, "size": str(sectors), "ro": "0"})
        (self.root / "dev/block" / number).symlink_to(folder)
        return folder

    @staticmethod
    def write(folder: Path, attributes: dict[str, str]) -> None:
        for name, value in attributes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(sysfs, "SYSFS", tmp_path)
    return Tree(tmp_path)


def test_a_disk(tree: Tree) -> None:
    folder = tree.disk("sda", "8:0", 4096, wwid="naa.500a  0751", diskseq="9")
    (folder / "mq/0").mkdir(parents=True)
    disk = BlockDevice.of_number(8, 0, "/dev/disk/by-id/x")
    assert (disk.path, disk.name, disk.number) == ("/dev/disk/by-id/x", "sda", (8, 0))
    assert not disk.is_partition
    assert disk.disk is disk
    assert (disk.start, disk.size, disk.block_size) == (0, 2 * MIB, 512)
    assert disk.request_based
    assert not disk.read_only
    assert disk.diskseq == 9
    assert disk.in_flight == 7
    assert disk.permanent_name == "wwid:naa.500a 0751"
    assert disk.partitions == []
    assert disk.holders == []


def test_a_partition_and_its_disk(tree: Tree) -> None:
    folder = tree.disk("sda", "8:0", 8192, wwid="naa.5", diskseq="9")
    tree.partition(folder, "sda1", "8:1", 2048, 1024)
    second = tree.partition(folder, "sda2", "259:7", 3072, 512)
    (second / "holders/dm-3").mkdir()
    (folder / "mq").mkdir()
    (folder / "queue/logical_block_size").write_text("4096\n")
    part = BlockDevice.of_number(259, 7)
    assert (part.path, part.name, part.is_partition) == ("/dev/sda2", "sda2", True)
    assert (part.start, part.size, part.block_size) == (3072 * 512, 512 * 512, 4096)
    assert part.disk.number == (8, 0)
    assert part.request_based  # as its disk is
    assert part.diskseq == 9
    assert part.in_flight == 7  # of the whole disk: the partition's own misses some
    assert part.permanent_name == "wwid:naa.5-part2"
    assert part.partitions == []
    assert part.holders == ["dm-3"]
    disk = part.disk
    assert [p.name for p in disk.partitions] == ["sda1", "sda2"]
    assert disk.holders == ["dm-3"]


def test_a_bio_based_disk(tree: Tree) -> None:
    tree.disk("dm-3", "254:3", 8192, **{"dm/uuid": "LVM-abc"})
    disk = BlockDevice.of_number(254, 3)
    assert not disk.request_based
    assert disk.permanent_name == "uuid:LVM-abc"
    assert disk.diskseq == 0  # a kernel before 5.15


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"dm/uuid": "LVM-1", "wwid": "naa.1"}, "uuid:LVM-1"),
        ({"md/uuid": "d4e5"}, "uuid:d4e5"),
        ({"wwid": "naa.1", "device/serial": "S1"}, "wwid:naa.1"),
        ({"device/wwid": "t10.ATA  x", "serial": "S1"}, "wwid:t10.ATA x"),
        ({"serial": "S1"}, "serial:S1"),
        ({"device/serial": "S2"}, "serial:S2"),
        ({"loop/backing_file": "/srv/a  b", "loop/offset": "0"}, "loop:/srv/a  b"),
        ({"loop/backing_file": "/srv/a", "loop/offset": "512"}, "loop:/srv/a@512"),
        ({"wwid": ""}, ""),
        ({}, ""),
    ],
)
def test_permanent_name(attributes: dict[str, str], expected: str, tree: Tree) -> None:
    tree.disk("no-such-name", "240:9", 8, **attributes)
    assert BlockDevice.of_number(240, 9).permanent_name == expected


def test_a_name_with_a_slash(tree: Tree) -> None:
    tree.disk("cciss!c0d0", "104:0", 8)
    assert BlockDevice.of_number(104, 0).path == "/dev/cciss/c0d0"


def test_what_is_no_block_device(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in [
        (tmp_path / "file", "is not a block device"),
        (tmp_path, "is not a block device"),
        ("/dev/null", "is not a block device"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "file/x", "Not a directory"),
    ]:
        with pytest.raises(UsageError, match=why) as caught:
            BlockDevice.find(str(path))
        assert str(path) in str(caught.value)
        assert caught.value.hint


def test_a_node_without_a_device(tree: Tree) -> None:
    with pytest.raises(UsageError, match="/dev/loop99 has no device behind it"):
        BlockDevice.of_number(7, 99, "/dev/loop99")


MOUNTINFO = (
    b"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
    b"23 22 8:1 / /mnt/with\\040space\\011tab\\134n rw shared:1 master:2 - xfs /dev/sda1 ro,attr2\n"
    b"24 22 0:5 / /dev rw - devtmpfs none rw\n"
    b"25 22 8:2 / /mnt/\xff\xe2\x80\xa8odd rw - ext4 /dev/sda2 rw\n"  # Latin-1; a line separator
    b"26 24 8:3 / /dev rw - ext4 /dev/sda3 rw\n"
)


@pytest.fixture
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_bytes(MOUNTINFO)
    monkeypatch.setattr(sysfs, "MOUNTINFO", tmp_path / "mountinfo")


@pytest.mark.usefixtures("mountinfo")
def test_mounts() -> None:
    found = sysfs.mounts()
    assert [mount.number for mount in found] == ["254:0", "8:1", "0:5", "8:2", "8:3"]
    assert [mount.kind for mount in found] == ["ext4", "xfs", "devtmpfs", "ext4", "ext4"]
    assert found[1].point == Path("/mnt/with space\ttab\\n")
    assert [mount.writable for mount in found] == [True, False, True, True, True]
    assert found[1].source == "/dev/sda1"
    assert [mount.id for mount in found] == [22, 23, 24, 25, 26]
    assert os.fsencode(found[3].point) == b"/mnt/\xff\xe2\x80\xa8odd"
    assert sysfs.filesystem_at(Path("/dev")) == "ext4"  # the last one hides the others
    assert sysfs.filesystem_at(Path("/nowhere")) == ""


@pytest.mark.usefixtures("mountinfo")
def test_mounts_of_a_device(tree: Tree) -> None:
    disk = tree.disk("sda", "8:0", 8192)
    for number in (1, 2, 3):
        tree.partition(disk, f"sda{number}", f"8:{number}", 1024 * number, 1024)
    assert len(BlockDevice.of_number(8, 0).mounts) == 3
    assert BlockDevice.of_number(8, 3).mounts == [Path("/dev")]


def test_mounts_of_this_machine() -> None:
    assert sysfs.filesystem_at(Path("/proc")) == "proc"
    assert sysfs.mounts(Path(f"/proc/{os.getpid()}/mountinfo")) == sysfs.mounts()
    assert sysfs.mounts(Path("/nowhere")) == []


def test_boot_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLKTRACK_BOOT_ID", raising=False)
    assert len(sysfs.boot_id()) == 36
    assert sysfs.boot_id() == sysfs.boot_id()
    monkeypatch.setenv("BLKTRACK_BOOT_ID", "another boot")
    assert sysfs.boot_id() == "another boot"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk image"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    device = run("losetup", "--find", "--show", "--partscan", image)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@pytest.mark.needs("root", "loop", "sfdisk")
def test_a_real_disk_with_partitions(loop: str, tmp_path: Path) -> None:
    script = "label: gpt\nstart=2048, size=4096\nstart=8192, size=8192\n"
    environment = {**os.environ, "PATH": TOOL_PATH}
    subprocess.run(
        ["sfdisk", "--quiet", loop], input=script, check=True, text=True, env=environment
    )
    run("partx", "--update", loop)  # for kernels that read no partition tables themselves
    disk = BlockDevice.find(loop)
    assert disk.request_based
    assert not disk.is_partition
    assert (disk.size, disk.block_size, disk.start) == (16 * MIB, 512, 0)
    assert disk.diskseq > 0
    assert disk.permanent_name == f"loop:{tmp_path}/disk image"
    one, two = disk.partitions
    assert (one.start, one.size, two.start, two.size) == (MIB, 2 * MIB, 4 * MIB, 4 * MIB)
    for part in (one, two):
        assert part.disk == disk
        assert part.request_based
        assert part.permanent_name == f"{disk.permanent_name}-part{part.name[-1]}"
    assert sysfs.loops_backed_by(tmp_path / "disk image") == [disk.name]
    # By another name too, and not by another file.
    (tmp_path / "link").symlink_to("disk image")
    (tmp_path / "other").write_bytes(b"")
    assert sysfs.loops_backed_by(tmp_path / "link") == [disk.name]
    assert sysfs.loops_backed_by(tmp_path / "other") == []
    assert sysfs.loops_backed_by(tmp_path / "none") == []


@pytest.mark.needs("root", "loop", "ext4")
def test_a_real_mount(loop: str, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", loop)
    point = tmp_path / "mount point"
    point.mkdir()
    disk = BlockDevice.find(loop)
    assert disk.mounts == []
    run("mount", loop, point)
    try:
        assert disk.mounts == [point]
        assert sysfs.filesystem_at(point) == "ext4"
    finally:
        run("umount", point)
    assert disk.mounts == []


@pytest.mark.needs("root", "zram")
def test_a_real_bio_based_disk() -> None:
    control = Path("/sys/class/zram-control")
    number = (control / "hot_add").read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(16 * MIB))
        disk = BlockDevice.find(f"/dev/zram{number}")
        assert not disk.request_based
        assert (disk.size, disk.block_size) == (16 * MIB, 4096)
    finally:
        (control / "hot_remove").write_text(number)
