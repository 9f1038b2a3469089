"""Many requests of direct I/O by one call: Linux AIO, which works where io_uring is disabled."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import sys

import numpy as np
from numpy.typing import NDArray

from blktrack.linux import Buffer

_libc = ctypes.CDLL(None, use_errno=True)

# io_setup, io_destroy, io_getevents, io_submit by machine; others go without.
_AIO_CALLS = {
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
    "riscv64": (0, 1, 4, 2),
    "loongarch64": (0, 1, 4, 2),
    "ppc64le": (227, 228, 229, 230),
    "s390x": (243, 244, 245, 246),
}
_IOCB_CMD_PREAD, _IOCB_CMD_PWRITE = 0, 1
# linux/aio_abi.h
_IOCB = np.dtype(
    [
        ("data", "u8"),
        ("key_and_flags", "u8"),
        ("opcode", "u2"),
        ("priority", "i2"),
        ("fd", "u4"),
        ("buffer", "u8"),
        ("bytes", "u8"),
        ("offset", "i8"),
        ("reserved", "u8"),
        ("flags", "u4"),
        ("event_fd", "u4"),
    ]
)
_IO_EVENT = np.dtype([("data", "u8"), ("iocb", "u8"), ("result", "i8"), ("result2", "i8")])

_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long] * 6
_syscall.restype = ctypes.c_long


def _call(number: int, *arguments: int) -> int:
    padded = (*arguments, 0, 0, 0, 0, 0)[:5]
    while (result := int(_syscall(number, *padded))) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return result


class RequestQueue:
    """Up to `depth` requests of direct I/O in flight at once, for one thread."""

    def __init__(self, depth: int) -> None:
        """OSError where the machine or the kernel has none, or all are taken (fs.aio-max-nr)."""
        calls = _AIO_CALLS.get(platform.machine()) if sys.maxsize > 1 << 32 else None
        if calls is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        setup, self._destroy, self._getevents, self._submit = calls
        self._iocbs = np.zeros(depth, dtype=_IOCB)
        self._iocbs["data"] = np.arange(depth)
        first = int(self._iocbs.ctypes.data)
        self._pointers = np.arange(depth, dtype=np.uint64) * np.uint64(64) + np.uint64(first)
        self._events = np.zeros(depth, dtype=_IO_EVENT)
        context = ctypes.c_ulong(0)
        _call(setup, depth, ctypes.addressof(context))
        self._context = context.value

    def move(
        self, fd: int, buffer: Buffer, rows: NDArray[np.int64], *, write: bool
    ) -> NDArray[np.int64]:
        """Read or write `rows` of (offset, length, place in the buffer), in any order.

        Returns, for each row, the bytes moved or minus an errno; 0 if it could not be asked for.
        """
        if (rows < 0).any() or int((rows[:, 1] + rows[:, 2]).max(initial=0)) > buffer.size:
            raise ValueError("a request is outside the buffer")
        results = np.zeros(len(rows), dtype=np.int64)
        depth = len(self._iocbs)
        for first in range(0, len(rows), depth):
            some = slice(first, first + depth)
            results[some] = self._move(fd, buffer, rows[some], write=write)
        return results

    def _move(
        self, fd: int, buffer: Buffer, rows: NDArray[np.int64], *, write: bool
    ) -> NDArray[np.int64]:
        """At most `depth` rows."""
        count = len(rows)
        results = np.zeros(count, dtype=np.int64)
        iocbs = self._iocbs[:count]
        iocbs["opcode"] = _IOCB_CMD_PWRITE if write else _IOCB_CMD_PREAD
        iocbs["fd"] = fd
        iocbs["offset"], iocbs["bytes"] = rows[:, 0], rows[:, 1]
        iocbs["buffer"] = rows[:, 2] + buffer.address
        pointers, events = int(self._pointers.ctypes.data), int(self._events.ctypes.data)
        asked = 0
        with contextlib.suppress(OSError):  # what is refused stays 0
            while asked < count:
                asked += _call(self._submit, self._context, count - asked, pointers + 8 * asked)
        left = asked
        while left:
            got = _call(self._getevents, self._context, left, left, events, 0)
            ended = self._events[:got]
            results[ended["data"].astype(np.int64)] = ended["result"]
            left -= got
        return results

    def close(self) -> None:
        """Returns once nothing is in flight."""
        context, self._context = self._context, 0
        if context:
            _call(self._destroy, context)
