"""Scratch devices, in memory: loop for those driven by requests, the others show bios alone."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blktrack.errors import UsageError
from blktrack.probe import ioctls
from blktrack.probe.room import PATIENCE, ZRAM, Room, dmsetup
from blktrack.sysfs import SYSFS, BlockDevice, read_text
from blktrack.units import MIB, SECTOR

SIZE = 256 * MIB  # of which only what is written takes memory
_NULL_BLK = Path("/sys/kernel/config/nullb")


class Absent(Exception):
    """What would be probed is not here; the reason is a clause."""


@dataclass(frozen=True)
class Kind:
    name: str
    based: str  # request or bio
    make: Callable[[Room, ExitStack], str]  # the device's name in /dev


def _node(name: str) -> str:
    """The path of a device that the kernel has just made."""
    path = Path("/dev") / name
    deadline = time.monotonic() + PATIENCE
    while not path.is_block_device():
        if time.monotonic() > deadline:
            raise Absent(f"{path} does not appear")
        time.sleep(0.001)
    return str(path)


def _loop(room: Room, held: ExitStack) -> str:
    """Over a file without a name: the kernel detaches it when it is closed, whoever dies."""
    backing = os.memfd_create(room.folder.name, os.MFD_CLOEXEC)
    held.callback(os.close, backing)
    os.truncate(backing, SIZE)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            name = f"loop{ioctls.free_loop(control)}"
            fd = os.open(_node(name), os.O_RDWR | os.O_CLOEXEC)
            try:
                ioctls.attach_loop(fd, backing, SECTOR)
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:  # another took it in between
                    raise
            else:
                held.callback(os.close, fd)
                return name
    finally:
        os.close(control)


def _zram(room: Room, held: ExitStack) -> str:
    try:
        number = (ZRAM / "hot_add").read_text().strip()
    except FileNotFoundError as error:
        raise Absent("zram is not loaded (modprobe zram)") from error
    folder = SYSFS / f"block/zram{number}"
    room.note("zram", f"{number} {(folder / 'diskseq').read_text().strip()}")
    held.callback(room.undo, "zram")
    (folder / "disksize").write_text(str(SIZE))
    return f"zram{number}"


def _null_blk(room: Room, held: ExitStack) -> str:
    """With queue_mode 0 it takes bios. Named after its folder, or by a number: 49c3b9266a71."""
    if not _NULL_BLK.is_dir():
        raise Absent("null_blk is not loaded (modprobe null_blk nr_devices=0)")
    folder = _NULL_BLK / room.folder.name
    room.note("null_blk", str(folder))
    held.callback(room.undo, "null_blk")
    folder.mkdir()
    wanted = {"queue_mode": 0, "memory_backed": 1, "discard": 1, "blocksize": SECTOR}
    for name, value in {**wanted, "size": SIZE // MIB, "power": 1}.items():
        with contextlib.suppress(FileNotFoundError):
            (folder / name).write_text(str(value))
    if (SYSFS / "block" / folder.name).exists():
        return folder.name
    return f"nullb{(folder / 'index').read_text().strip()}"


def _dm(room: Room, held: ExitStack) -> str:
    # Its node in /dev may be there before it is, to load it (kmod-static-nodes.service).
    if "device-mapper" not in Path("/proc/misc").read_text(encoding="ascii").split():
        raise Absent("the kernel has no device-mapper, or it is not loaded (modprobe dm-mod)")
    # Kept by the volume: held by this one as well, it goes with the later of the two.
    below = _node(_loop(room, held))
    name = room.folder.name
    room.note("dm", name)
    held.callback(room.undo, "dm")
    try:
        dmsetup("create", name, "--noudevsync", "--table", f"0 {SIZE // SECTOR} linear {below} 0")
    except OSError as error:
        raise Absent(str(error.strerror)) from error
    for entry in (SYSFS / "block").glob("dm-*"):
        if read_text(entry / "dm/name") == name:
            return entry.name
    raise Absent("the volume was made and is not in /sys/block")


KINDS = (
    Kind("loop", "request", _loop),
    Kind("zram", "bio", _zram),
    Kind("null_blk", "bio", _null_blk),
    Kind("dm", "bio", _dm),
)


def make(kind: Kind, room: Room, held: ExitStack) -> BlockDevice:
    """A new device, which goes with `held`. Absent with the reason where there can be none."""
    try:
        return BlockDevice.find(_node(kind.make(room, held)))
    except (OSError, UsageError) as error:
        raise Absent(f"no scratch {kind.name} device can be made: {_said(error)}") from error


def _said(error: OSError | UsageError) -> str:
    if isinstance(error, UsageError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}"
