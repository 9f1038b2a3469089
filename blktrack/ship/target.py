"""What a replica must not be: every refusal that needs nothing but looking (promise P7).

Nothing here opens a target for writing or changes it. What a target holds already, and whether it
is ours, is `replica`'s to judge.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from blktrack.errors import BlktrackError, Refused, UsageError
from blktrack.ship.address import is_remote
from blktrack.ship.stack import below, device_number, holding, numbers, shares_backing
from blktrack.sysfs import BlockDevice, loops_backed_by, read_text, unescape
from blktrack.units import format_size

_OTHER = "choose another replica"


@dataclass(frozen=True)
class Target:
    """A place for a replica: a block device, a file, or a file that is not there yet."""

    name: str  # as the user wrote it
    path: str  # with its links resolved
    device: BlockDevice | None  # None: a file
    exists: bool

    @classmethod
    def find(cls, name: str) -> Target:
        """UsageError for what is elsewhere, Refused for what cannot hold a replica."""
        if is_remote(name):
            raise UsageError(
                f"{name} is on another host, and this is about replicas of this one",
                hint="name a block device or a file of this host; sync and verify reach others",
            )
        path = os.path.realpath(name)
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return cls._absent(name, path)
        except OSError as error:
            raise Refused(f"{name}: {error.strerror}", hint=_OTHER) from error
        if stat.S_ISBLK(mode):
            return cls(name, path, BlockDevice.find(path), True)
        if stat.S_ISREG(mode):
            return cls(name, path, None, True)
        if stat.S_ISDIR(mode):
            raise Refused(f"{name} is a directory", hint=f"name a file in it: {name}/replica.img")
        raise Refused(f"{name} is neither a block device nor a file", hint=_OTHER)

    @classmethod
    def _absent(cls, name: str, path: str) -> Target:
        folder = os.path.dirname(path)
        try:
            info = os.stat(folder)
        except OSError as error:
            raise Refused(
                f"{name} cannot be created: {folder}: {error.strerror}",
                hint=f"mkdir -p {folder}, or {_OTHER}",
            ) from error
        if info.st_dev == os.stat("/dev").st_dev:
            # A file there would fill memory and be gone after a boot: a device was misspelt.
            raise Refused(f"{name} does not exist", hint="check the name of the device (lsblk)")
        return cls(name, path, None, False)


def mount_point(path: str) -> str:
    """Where the file system is mounted that a file is on, or would be."""
    folder = os.path.dirname(path)
    while not os.path.ismount(folder):
        folder = os.path.dirname(folder)
    return folder


def check(target: Target, source: BlockDevice, *, writable: bool = True) -> None:
    """Refused if the target is in use, is part of the source or cannot hold it."""
    if target.device is not None:
        _check_relation(target.name, target.device, source)
        check_room(target, source.size)
        _check_device(target.name, target.device, source)
    else:
        _check_file(target, source)
    if writable:
        check_idle(target)


def check_idle(target: Target) -> None:
    """Refused if the target is read-only, or in use as far as can be seen."""
    name, device = target.name, target.device
    if device is not None:
        if why := in_use(device):
            raise Refused(f"{name} {why}", hint=f"release it (umount, swapoff, …), or {_OTHER}")
        if device.read_only or device.disk.read_only:
            raise Refused(f"{name} is read-only", hint=f"blockdev --setrw {name}, or {_OTHER}")
        return
    path = Path(target.path)
    if loops := loops_backed_by(path):
        names = ", ".join(f"/dev/{loop}" for loop in loops)
        raise Refused(f"{name} is attached to {names}", hint=f"losetup -d {names}, or {_OTHER}")
    if target.exists and any(os.path.samefile(swap, path) for swap in _swaps()):
        raise Refused(f"{name} is used as swap", hint=f"swapoff {name}, or {_OTHER}")


def check_room(target: Target, size: int) -> None:
    """Refused if a device is smaller than its source of `size` bytes."""
    device = target.device
    if device is not None and device.size < size:
        raise Refused(
            f"{target.name} is too small: {format_size(device.size)} ({device.size} bytes) for a"
            f" source of {format_size(size)} ({size} bytes)",
            hint="choose a replica at least as large as the source",
        )


def _check_relation(name: str, device: BlockDevice, source: BlockDevice) -> None:
    reason = ""
    if device.number == source.number:
        reason = "is the source itself"
    elif device.number == source.disk.number:
        reason = f"is the whole disk that the source {source.path} is a partition of"
    elif device.disk.number == source.number:
        reason = f"is a partition of the source {source.path}"
    elif shares_backing(device, source):
        reason = f"is a loop device over the same file as the source {source.path}"
    elif source.number in numbers(below(device)):
        reason = f"lies on the source {source.path}"
    elif device.number in numbers(below(source)):
        reason = f"holds the source {source.path}"
    if reason:
        raise Refused(f"{name} {reason}", hint=_OTHER)


def _check_device(name: str, device: BlockDevice, source: BlockDevice) -> None:
    if device.block_size > source.block_size:
        raise Refused(
            f"{name} has blocks of {device.block_size} bytes, the source of {source.block_size}:"
            " it cannot take every change",
            hint="use a file as the replica, or a device with smaller logical blocks",
        )


def in_use(device: BlockDevice) -> str:
    """Who has the device, as far as can be seen: "is mounted on /mnt"; "" if nobody."""
    if mounts := device.mounts:
        return f"is mounted on {', '.join(str(mount) for mount in mounts)}"
    parts = numbers([device, *device.partitions])
    for swap in _swaps():
        if device_number(swap) in parts:
            return f"is used as swap ({swap})"
    if holders := device.holders:
        return f"is part of {', '.join(holders)}"
    return ""


def _check_file(target: Target, source: BlockDevice) -> None:
    name, path = target.name, Path(target.path)
    for device in holding(path if target.exists else path.parent):
        if source.number in numbers([device, *below(device)]):
            raise Refused(
                f"{name} lies on a file system that is on the source {source.path}", hint=_OTHER
            )


def _swaps() -> list[str]:
    """Devices and files that are swapped to."""
    lines = (read_text("/proc/swaps") or "").split("\n")[1:]
    names = [unescape(line.split(" ")[0]) for line in lines]
    return [name for name in names if os.path.exists(name)]


@dataclass(frozen=True)
class Signature:
    """What `blkid` finds on a device or in a file; all "" if nothing known is there."""

    kind: str = ""
    usage: str = ""
    uuid: str = ""
    table: str = ""
    table_uuid: str = ""

    def __str__(self) -> str:
        if self.kind:
            what = {"filesystem": "a file system", "raid": "a volume", "crypto": "a crypt volume"}
            return f"{what.get(self.usage, 'a signature')} ({self.kind})"
        return f"a partition table ({self.table})" if self.table else ""


def signature(path: str) -> Signature:
    """Ask `blkid`, which looks at the bytes and at no cache."""
    blkid = shutil.which("blkid", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if blkid is None:
        raise BlktrackError(
            f"cannot tell what {path} holds: blkid is missing", hint="install util-linux"
        )
    done = subprocess.run(
        [blkid, "-p", "-o", "export", path], capture_output=True, text=True, check=False
    )
    if done.returncode == 2 and not done.stdout:
        return Signature()
    if done.returncode == 8:
        return Signature(kind="several that contradict each other")
    if done.returncode != 0:
        said = done.stderr.strip() or f"it ended with code {done.returncode}"
        raise BlktrackError(
            f"cannot tell what {path} holds: blkid: {said}",
            hint=f"run blkid -p {path} to see what ails it; it has to be readable",
        )
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    keys = ("TYPE", "USAGE", "UUID", "PTTYPE", "PTUUID")
    return Signature(*(found.get(key, "") for key in keys))
