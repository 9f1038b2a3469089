"""Who uses a block device: mounts, volumes, claims, and processes that have it open."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from blktrack.errors import Refused
from blktrack.sysfs import BlockDevice, read_text


class InUse(Refused):
    """Somebody has the device open, mounted or claimed; the message says who, as a clause."""


@contextlib.contextmanager
def claimed(device: BlockDevice) -> Iterator[int]:
    """Hold a device that nobody uses, open for reading past the page cache. InUse if one does.

    While it is held nothing can mount it or build on it; a process could still open it.
    """
    if mounts := device.mounts:
        raise InUse(f"it is mounted at {mounts[0]}")
    if holders := device.holders:
        raise InUse(f"it is part of {', '.join(holders)}")
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUse("it is mounted or claimed") from error
        raise InUse(f"it cannot be opened ({error.strerror})") from error
    try:
        if who := opener(device):
            raise InUse(f"it is open in {who}")
        yield fd
    finally:
        os.close(fd)


def opener(device: BlockDevice) -> str:
    """A process, or a loop device, that has the device open, its disk or a partition; "" if none.

    The kernel counts openers and tells nobody, so this looks through /proc/PID/fd.
    """
    parts = {part.number for part in device.partitions}
    numbers = {os.makedev(*number) for number in {device.number, device.disk.number} | parts}
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        if _is_one_of(read_text(loop) or "", numbers):
            return loop.parent.parent.name
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            for entry in os.scandir(process / "fd"):
                if _is_one_of(entry.path, numbers):
                    return f"{read_text(process / 'comm')} (process {process.name})"
    return ""


def _is_one_of(path: str, numbers: set[int]) -> bool:
    try:
        info = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(info.st_mode) and info.st_rdev in numbers
