"""What a device or a file lies on: the disks, volumes and files below it, as far as sysfs tells."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blktrack.errors import UsageError
from blktrack.sysfs import SYSFS, BlockDevice, mount_of


def device_number(path: str) -> tuple[int, int] | None:
    """Of a block device; None for anything else."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISBLK(info.st_mode):
        return None
    return os.major(info.st_rdev), os.minor(info.st_rdev)


def numbers(devices: list[BlockDevice]) -> set[tuple[int, int]]:
    return {device.number for device in devices}


def below(device: BlockDevice) -> list[BlockDevice]:
    """Every device that this one is made of: its disk, its slaves, what its file lies on."""
    found: dict[tuple[int, int], BlockDevice] = {}
    todo = [device]
    while todo:
        for lower in _directly_below(todo.pop()):
            if lower.number not in found and lower.number != device.number:
                found[lower.number] = lower
                todo.append(lower)
    return list(found.values())


def _directly_below(device: BlockDevice) -> list[BlockDevice]:
    if device.is_partition:
        return [device.disk]
    slaves = device.sys / "slaves"
    names = [entry.name for entry in slaves.iterdir()] if slaves.is_dir() else []
    found = [lower for name in names if (lower := _by_name(name))]
    if backing := _backing(device):
        number = device_number(str(backing))
        found += [BlockDevice.of_number(*number)] if number else holding(backing)
    return found


def _by_name(name: str) -> BlockDevice | None:
    try:
        major, minor = (SYSFS / "class/block" / name / "dev").read_text().split(":")
        return BlockDevice.of_number(int(major), int(minor))
    except (OSError, ValueError, UsageError):
        return None


def _backing(device: BlockDevice) -> Path | None:
    """The file or device behind a loop device, if it is still there."""
    path = Path(device.backing)
    return path if device.backing and path.exists() else None


def shares_backing(one: BlockDevice, other: BlockDevice) -> bool:
    """Whether two loop devices show overlapping ranges of one file."""
    first, second = _backing(one.disk), _backing(other.disk)
    if first is None or second is None or not first.samefile(second):
        return False
    starts = [_loop_offset(device) + device.start for device in (one, other)]
    return starts[0] < starts[1] + other.size and starts[1] < starts[0] + one.size


def _loop_offset(device: BlockDevice) -> int:
    return int((device.disk.sys / "loop/offset").read_text())


def holding(path: Path) -> list[BlockDevice]:
    """The devices that the file system of `path` lies on, as far as the kernel tells."""
    file_system = os.stat(path).st_dev
    if os.major(file_system):
        return [BlockDevice.of_number(os.major(file_system), os.minor(file_system))]
    # btrfs and others have a number of their own; the mount names one device.
    mount = mount_of(path)
    if mount is None or not mount.source.startswith("/"):
        return []
    if not (number := device_number(mount.source)):
        return []
    device = BlockDevice.of_number(*number)
    members = [device]
    if mount.kind == "btrfs":
        for uuid in (SYSFS / "fs/btrfs").glob("*-*"):
            names = [entry.name for entry in (uuid / "devices").iterdir()]
            if device.name in names:
                members = [member for entry in names if (member := _by_name(entry))]
    return members
