"""The ioctls that make scratch devices and their partitions. Numbers are the kernel's.

Everything takes a file descriptor and bytes, and raises OSError.
"""

from __future__ import annotations

import ctypes
import fcntl
import struct

from blktrack.linux import BLKPG

# linux/blkpg.h: struct blkpg_ioctl_arg and blkpg_partition
_BLKPG_ADD_PARTITION, _BLKPG_DEL_PARTITION = 1, 2
_BLKPG_ARG, _BLKPG_PARTITION = struct.Struct("@iiiP"), struct.Struct("@qqi64s64s4x")

# linux/loop.h: of struct loop_config descriptor, block size and flags
LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C0A, 0x4C82
LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN = 4, 8
_LOOP_CONFIG = struct.Struct("=II52xI240x")


def add_partition(fd: int, number: int, start: int, length: int) -> None:
    """Let the kernel show these bytes of a disk as its partition `number`; no table is written."""
    _partition(fd, _BLKPG_ADD_PARTITION, number, start, length)


def remove_partition(fd: int, number: int) -> None:
    """EBUSY: somebody has it open."""
    _partition(fd, _BLKPG_DEL_PARTITION, number, 0, 0)


def _partition(fd: int, operation: int, number: int, start: int, length: int) -> None:
    raw = ctypes.create_string_buffer(_BLKPG_PARTITION.pack(start, length, number, b"", b""))
    size, address = _BLKPG_PARTITION.size, ctypes.addressof(raw)
    fcntl.ioctl(fd, BLKPG, _BLKPG_ARG.pack(operation, 0, size, address))


def free_loop(control: int) -> int:
    """The number of a loop device that nobody uses yet, made if there is none."""
    return int(fcntl.ioctl(control, LOOP_CTL_GET_FREE))


def attach_loop(fd: int, backing: int, block_size: int) -> None:
    """Back a loop device by a file until whoever has it open has closed it, or died.

    Since Linux 5.8. EBUSY: it has a file by now.
    """
    flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN  # without the second it keeps its partitions
    fcntl.ioctl(fd, LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, block_size, flags))
