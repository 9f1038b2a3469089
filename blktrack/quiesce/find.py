"""Which mounted file systems lie on a device, and which of them a path needs to be written.

Sysfs knows the partitions, holders (device-mapper, md) and loop devices on a device, /proc the
mounts of every namespace that a process lives in. A loop device over a *file* is not followed: what
is in it is data of the file system that has the file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blktrack.errors import Refused, UsageError
from blktrack.ship import stack
from blktrack.sysfs import SYSFS, BlockDevice, Mount, mount_numbered, mounts

Number = tuple[int, int]

_PROC = Path("/proc")
# Kinds that name the device of each instance in /sys/fs/KIND, mounted where one sees it or not.
_TELLING = ("ext4", "xfs", "f2fs", "nilfs2")
_ELSEWHERE = "unmount it there, mount it here too, or take a crash-consistent point"


@dataclass(frozen=True)
class FileSystem:
    """A writable file system, mounted in this namespace at least once."""

    number: str  # "major:minor", which tells it from every other
    kind: str  # "ext4"
    points: tuple[Path, ...]
    devices: frozenset[Number]  # that it lies on directly

    def __str__(self) -> str:
        return f"{self.kind} at {self.points[0]}"

    def open(self) -> int:
        """A descriptor of something in it. Refused if no mount of it can be reached."""
        for point in self.points:
            try:
                fd = os.open(point, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            mount = _mount_of(fd)
            if mount is not None and mount.number == self.number:
                return fd
            os.close(fd)
        raise Refused(
            f"the {self} cannot be reached: it is hidden or gone", hint="look at it with findmnt"
        )

    def is_under(self, path: Path) -> bool:
        """Whether a write to `path`, which need not exist, could need a write to this."""
        return not self.devices.isdisjoint(devices_below(path))


def file_systems(device: BlockDevice) -> list[FileSystem]:
    """Those that write to `device`, in the order in which they were mounted.

    Refused if one is mounted only where this namespace does not see it, and so could not be frozen.
    """
    above = _upwards(device)
    found: dict[str, list[Mount]] = {}
    seen: set[Number] = set()
    for mount in mounts():
        devices = _devices_of(mount)
        if not devices.isdisjoint(above):
            found.setdefault(mount.number, []).append(mount)
            seen |= devices
    for pid, mount in _mounts_elsewhere():
        devices = _devices_of(mount)
        if mount.number in found or devices.isdisjoint(above):
            continue
        seen |= devices
        if mount.writable:
            raise Refused(
                f"{device.path} holds a file system ({mount.kind}) that only another mount"
                f" namespace shows, that of process {pid}, at {mount.point}",
                hint=_ELSEWHERE,
            )
    for number, upper in above.items():
        if number not in seen and (kind := _in_use_by(upper)):
            raise Refused(
                f"{device.path} holds a file system ({kind} on {upper.name}) that is mounted where"
                " no process shows it",
                hint=_ELSEWHERE,
            )
    return [
        FileSystem(
            number, group[0].kind, tuple(m.point for m in group), frozenset(_devices_of(group[0]))
        )
        for number, group in found.items()
        if group[0].writable
    ]


def _upwards(device: BlockDevice) -> dict[Number, BlockDevice]:
    """The device and everything that is made of it or of a part of it."""
    loops = list(_loops())
    found: dict[Number, BlockDevice] = {}
    todo = [device]
    while todo:
        lower = todo.pop()
        if lower.number in found:
            continue
        found[lower.number] = lower
        todo += lower.partitions
        todo += _known(SYSFS / "class/block" / name for name in lower.holders)
        todo += [loop for loop, backing in loops if backing == lower.number]
    return found


def _loops() -> Iterator[tuple[BlockDevice, Number]]:
    """Loop devices whose backing file is a device, with that device's number."""
    for attribute in (SYSFS / "block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            backing = os.fsdecode(attribute.read_bytes()).rstrip("\n")
            if backing.startswith("/dev/") and (number := stack.device_number(backing)):
                for loop in _known([attribute.parent.parent]):
                    yield loop, number


def _known(folders: Iterable[Path]) -> Iterator[BlockDevice]:
    """The devices of these folders of sysfs, without those that go away meanwhile."""
    for folder in folders:
        with contextlib.suppress(OSError, UsageError):
            yield BlockDevice.of_number(*_number(folder))


def _number(folder: Path) -> Number:
    major, minor = (folder / "dev").read_text(encoding="ascii").split(":")
    return int(major), int(minor)


def _devices_of(mount: Mount) -> set[Number]:
    """What a mounted file system lies on, without touching it: a remote one may hang."""
    major, minor = mount.number.split(":")
    if major != "0":
        return {(int(major), int(minor))}
    # btrfs and others have a number of their own and name one device, or all with colons between.
    names = [name for name in mount.source.split(":") if name.startswith("/dev/")]
    found = {number for name in names if (number := stack.device_number(name))}
    if mount.kind == "btrfs":
        for folder in (SYSFS / "fs/btrfs").glob("*-*/devices"):
            with contextlib.suppress(OSError):  # unmounted meanwhile
                members = {_number(entry) for entry in folder.iterdir()}
                if not members.isdisjoint(found):
                    found |= members
    return found


def _mounts_elsewhere() -> Iterator[tuple[str, Mount]]:
    """Mounts in the namespaces and roots of other processes, each with a process that sees it."""

    def view(pid: str) -> tuple[int, int, int]:
        root = os.stat(f"{_PROC}/{pid}/root")
        return os.stat(f"{_PROC}/{pid}/ns/mnt").st_ino, root.st_dev, root.st_ino

    # There may be thousands, and under a freeze writers wait for this: no Path for each.
    known = {view("self")}
    for pid in filter(str.isdigit, os.listdir(_PROC)):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (seen := view(pid)) not in known:
                known.add(seen)
                for mount in mounts(_PROC / pid / "mountinfo"):
                    yield pid, mount


def _in_use_by(device: BlockDevice) -> str:
    """Kind of a file system that has the device, mounted anywhere; "" if none tells."""
    for kind in _TELLING:
        if (SYSFS / "fs" / kind / device.name).exists():
            return kind
    # Only the members of a mounted one are there.
    members = (SYSFS / "fs/btrfs").glob(f"*-*/devices/{device.name}")
    return "btrfs" if next(members, None) else ""


def _mount_of(fd: int) -> Mount | None:
    """The mount through which a descriptor was opened."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    number = re.search(r"^mnt_id:\s*(\d+)$", text, re.M)
    return mount_numbered(int(number[1])) if number else None


def devices_below(path: Path) -> set[Number]:
    """Every device that a write to `path`, a device or a file, ends on, loop devices followed."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    if number := stack.device_number(str(path)):
        device = BlockDevice.of_number(*number)
        return stack.numbers([device, *stack.below(device)])
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mount = _mount_of(fd)
    finally:
        os.close(fd)
    if mount and mount.kind == "overlay" and (top := re.search("upperdir=([^,]+)", mount.options)):
        upper = Path(top[1])
        return devices_below(upper) if upper.exists() else set()
    found = stack.holding(path)
    return stack.numbers(found + [lower for device in found for lower in stack.below(device)])
