"""The table of a device-mapper device: what its data are made of, asked of the kernel.

A new table may bring other data under a device without a write to it. So a table is remembered, as
one line for each target with its start, its length, its type and digests of what it maps to: the
arguments themselves may hold a key, and go nowhere. DM_TABLE_STATUS says how the table was made,
and waits for nothing while the device is suspended (table_status in drivers/md/dm-ioctl.c).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from blktrack.errors import BlktrackError
from blktrack.linux import DM_TABLE_STATUS
from blktrack.sysfs import BlockDevice

_CONTROL = "/dev/mapper/control"
_ROOM = 16 << 10  # bytes for a table, to begin with

# linux/dm-ioctl.h: struct dm_ioctl, struct dm_target_spec. A version is one of the interface, the
# oldest will do: 4.0 is the one of every kernel since 2.6.
_IOCTL = struct.Struct("=3I7IQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")
_VERSION = (4, 0, 0)
_STATUS_TABLE, _BUFFER_FULL, _NOFLUSH, _SECURE_DATA = 1 << 4, 1 << 8, 1 << 11, 1 << 15


class Target(NamedTuple):
    """One line of a table, in sectors."""

    start: int
    length: int
    kind: str
    arguments: str


def table(device: BlockDevice) -> list[str]:
    """The table in force of the disk that a device is or is on, to be remembered; [] if it has
    none. BlktrackError if the kernel does not tell."""
    disk = device.disk
    if not disk.is_mapped:
        return []
    try:
        return lines(_read(disk.number))
    except OSError as error:
        raise BlktrackError(
            f"the device-mapper table of {device.path} cannot be read: {error.strerror}",
            hint=f"see that {_CONTROL} is there (dmsetup mknodes), then try again",
        ) from error


def lines(targets: Iterable[Target]) -> list[str]:
    """A table as it is remembered."""
    found = []
    for target in targets:
        ways = (hashlib.sha256(os.fsencode(way)).hexdigest()[:32] for way in _ways(target))
        found.append(" ".join([str(target.start), str(target.length), target.kind, *ways]))
    return found


def goes_on(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether all that was there is where it was: the device may have become longer."""
    if len(now) < len(before):
        return False
    last = len(before) - 1
    return all(
        _same(old.split(), new.split(), longer=number == last)
        for number, (old, new) in enumerate(zip(before, now, strict=False))
    )


def is_alike(before: Sequence[str], now: Sequence[str]) -> bool:
    """The same, over a boot: devices may have other numbers in it."""

    def shapes(table: Sequence[str]) -> list[str]:
        return [" ".join([*line.split()[:3], "?"]) for line in table]

    return goes_on(shapes(before), shapes(now))


def _same(old: list[str], new: list[str], *, longer: bool) -> bool:
    """Of the ways to the data of a target one that still is there is proof enough."""
    grown = longer and int(new[1]) > int(old[1])
    return (
        (old[0], old[2]) == (new[0], new[2])
        and (old[1] == new[1] or grown)
        and bool(set(old[3:]) & set(new[3:]))
    )


def _ways(target: Target) -> list[str]:
    """What leads to the data of a target, each by itself."""
    words = target.arguments.split()
    match target.kind:
        case "multipath":  # paths come and go, and the next group is told too (multipath_status)
            return [word for word in words if re.fullmatch(r"\d+:\d+", word)]
        case "delay":  # device, offset and delay of reads, of writes, of flushes
            return [" ".join(word for at, word in enumerate(words) if at % 3 < 2)]
        case "integrity":  # device, offset, tag; then options, fewer once it has recalculated
            return [" ".join(words[:3])]
        case _:
            return [target.arguments]


def _read(number: tuple[int, int]) -> Iterator[Target]:
    """The table in force of a device-mapper device. OSError."""
    fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        size, full = _ROOM, True
        while full:
            raw = bytearray(size)
            # DM_SECURE_DATA_FLAG: the kernel wipes what it had of keys.
            flags = _STATUS_TABLE | _NOFLUSH | _SECURE_DATA
            head = (*_VERSION, size, _IOCTL.size, 0, 0, flags, 0, 0, os.makedev(*number))
            _IOCTL.pack_into(raw, 0, *head, b"", b"")
            fcntl.ioctl(fd, DM_TABLE_STATUS, raw)
            _, _, _, _, begin, count, _, flags, *_ = _IOCTL.unpack_from(raw)
            full, size = bool(flags & _BUFFER_FULL), 4 * size
    finally:
        os.close(fd)
    at = begin
    for _ in range(count):
        start, length, _, following, kind = _TARGET.unpack_from(raw, at)
        text = bytes(raw[at + _TARGET.size : raw.index(0, at + _TARGET.size)])
        yield Target(start, length, os.fsdecode(kind.rstrip(b"\0")), os.fsdecode(text).strip())
        at = begin + following  # counted from the first of them
