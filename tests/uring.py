"""Discards handed over in one batch, so that adjacent ones become one request of several bios.

These are io_uring's commands of block devices, since Linux 6.12.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Any

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)

# asm-generic/unistd.h, linux/io_uring.h, uapi/linux/blkdev.h
IO_URING_SETUP, IO_URING_ENTER = 425, 426
IORING_ENTER_GETEVENTS = 1
IORING_OFF_SQES = 0x10000000
IORING_OP_URING_CMD = 46
BLOCK_URING_CMD_DISCARD = 0x12 << 8

_PARAMS = struct.Struct("=30I")
_SQE = np.dtype(
    {
        "names": ["opcode", "fd", "command", "start", "user_data", "length"],
        "formats": ["u1", "i4", "u4", "u8", "u8", "u8"],
        "offsets": [0, 4, 8, 16, 32, 48],
        "itemsize": 64,
    }
)


def _call(number: int, *arguments: Any) -> int:
    longs = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *longs))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def discard_at_once(path: str, ranges: list[tuple[int, int]]) -> None:
    """Discard (start, length) ranges, submitted by one call. OSError if the kernel cannot."""
    count = len(ranges)
    raw = ctypes.create_string_buffer(_PARAMS.size)
    ring = _call(IO_URING_SETUP, 1 << (count - 1).bit_length(), raw)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        params = _PARAMS.unpack(raw.raw)
        submissions, completions = params[0], params[1]
        tail, array, events = params[11], params[16], params[25]
        size = max(array + submissions * 4, events + completions * 16)
        sqes = np.zeros(count, dtype=_SQE)
        sqes["opcode"], sqes["fd"] = IORING_OP_URING_CMD, fd
        sqes["command"] = BLOCK_URING_CMD_DISCARD
        sqes["start"], sqes["length"] = np.array(ranges, dtype=np.uint64).T
        with (
            mmap.mmap(ring, size) as queues,
            mmap.mmap(ring, submissions * 64, offset=IORING_OFF_SQES) as entries,
        ):
            entries[: sqes.nbytes] = sqes.tobytes()
            queues[array : array + 4 * count] = np.arange(count, dtype=np.uint32).tobytes()
            queues[tail : tail + 4] = struct.pack("=I", count)
            asked = _call(IO_URING_ENTER, ring, count, count, IORING_ENTER_GETEVENTS, None, 0)
            assert asked == count
            ended = queues[events : events + 16 * count]
        for _, result, _ in struct.iter_unpack("=QiI", ended):
            if result < 0:
                raise OSError(-result, os.strerror(-result))
    finally:
        os.close(fd)
        os.close(ring)
