"""Raw Linux calls that Python does not wrap: ioctls, fallocate, statx, memory for direct I/O.

Names and numbers are the kernel's. Everything takes a file descriptor and bytes, raises OSError and
decides nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterator

import numpy as np

PAGE = mmap.PAGESIZE
_HUGE = 2 << 20  # below this a buffer cannot hold a huge page

_libc = ctypes.CDLL(None, use_errno=True)

# asm/ioctl.h: a few machines spell "no argument" 1 and have a 13-bit size.
_ODD = platform.machine().startswith(("ppc", "mips", "sparc", "alpha"))
_IOC_NONE, _IOC_READ, _IOC_WRITE = (1, 2, 4) if _ODD else (0, 2, 1)
_DIRSHIFT = 29 if _ODD else 30


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << _DIRSHIFT | size << 16 | kind << 8 | number


# linux/fs.h
BLKROGET = _ioc(_IOC_NONE, 0x12, 94, 0)
BLKFLSBUF = _ioc(_IOC_NONE, 0x12, 97, 0)
BLKSSZGET = _ioc(_IOC_NONE, 0x12, 104, 0)
BLKGETSIZE64 = _ioc(_IOC_READ, 0x12, 114, ctypes.sizeof(ctypes.c_size_t))
BLKDISCARD = _ioc(_IOC_NONE, 0x12, 119, 0)
BLKZEROOUT = _ioc(_IOC_NONE, 0x12, 127, 0)
BLKPG = _ioc(_IOC_NONE, 0x12, 105, 0)
_CLONE_RANGE = struct.Struct("=qQQQ")  # struct file_clone_range
FICLONERANGE = _ioc(_IOC_WRITE, 0x94, 13, _CLONE_RANGE.size)
FIFREEZE = _ioc(_IOC_READ | _IOC_WRITE, ord("X"), 119, ctypes.sizeof(ctypes.c_int))
FITHAW = _ioc(_IOC_READ | _IOC_WRITE, ord("X"), 120, ctypes.sizeof(ctypes.c_int))

# linux/dm-ioctl.h; its size is that of struct dm_ioctl
DM_TABLE_STATUS = _ioc(_IOC_READ | _IOC_WRITE, 0xFD, 12, 312)

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# linux/fcntl.h, linux/fs.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

# linux/prctl.h
_PR_SET_PDEATHSIG = 1

# linux/stat.h
AT_EMPTY_PATH = 0x1000
STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_DIO_MEM_ALIGN = 152  # offset of stx_dio_mem_align; stx_dio_offset_align follows


def device_size(fd: int) -> int:
    """Bytes of a block device."""
    raw = fcntl.ioctl(fd, BLKGETSIZE64, bytes(8))
    return int(struct.unpack("Q", raw)[0])


def block_size(fd: int) -> int:
    """Logical block of a block device: the unit of its direct I/O."""
    raw = fcntl.ioctl(fd, BLKSSZGET, bytes(4))
    return int(struct.unpack("i", raw)[0])


def read_only(fd: int) -> bool:
    """Whether a block device refuses writes."""
    raw = fcntl.ioctl(fd, BLKROGET, bytes(4))
    return bool(struct.unpack("i", raw)[0])


def flush_buffers(fd: int) -> None:
    """Write back and drop the page cache of a block device."""
    fcntl.ioctl(fd, BLKFLSBUF, 0)


def discard(fd: int, start: int, length: int) -> None:
    """Tell a block device that a range is unused; what it then reads is undefined."""
    fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", start, length))


def zero_out(fd: int, start: int, length: int) -> None:
    """Make a range of a block device read as zeroes, keeping it allocated."""
    fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", start, length))


def freeze(fd: int) -> None:
    """Write back the file system that a file is on and stop its writers, until it is thawed.

    EBUSY: it is frozen already. EOPNOTSUPP: its kind cannot be frozen. Whoever writes to it from
    now on hangs, and no signal ends that.
    """
    fcntl.ioctl(fd, FIFREEZE, 0)


def thaw(fd: int) -> None:
    """Undo `freeze`, whoever did it. EINVAL: it is not frozen, or not yet."""
    fcntl.ioctl(fd, FITHAW, 0)


def end_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when the thread that forked it ends."""
    if _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def sync_filesystem(fd: int) -> None:
    """Write back the file system that a file is on (syncfs)."""
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# Where off_t is 32 bits the call with the plain name would cut offsets.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def _allocate(fd: int, mode: int, start: int, length: int) -> None:
    while _fallocate(fd, mode, start, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def reserve(fd: int, start: int, length: int) -> None:
    """Give a range of a file its space; what it reads as stays the same."""
    _allocate(fd, FALLOC_FL_KEEP_SIZE, start, length)


def punch_hole(fd: int, start: int, length: int) -> None:
    """Free a range of a file, or zero one of a block device, freeing it if the device can."""
    _allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length)


def zero_range(fd: int, start: int, length: int) -> None:
    """Make a range read as zeroes, keeping its space."""
    _allocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, start, length)


def clone_range(source: int, start: int, length: int, fd: int, at: int) -> None:
    """Let a range of the file `fd` share the blocks of a range of the file `source`, holes too."""
    fcntl.ioctl(fd, FICLONERANGE, _CLONE_RANGE.pack(source, start, length, at))


def exchange(one: os.PathLike[str], other: os.PathLike[str]) -> None:
    """Let two files have each other's names, in one step (renameat2 with RENAME_EXCHANGE)."""
    names = os.fsencode(one), os.fsencode(other)
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """(start, length) of what a sparse file has allocated, by SEEK_DATA and SEEK_HOLE.

    A file system that does not know holes tells of one extent. Moves the file offset.
    """
    at = 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at - start


def direct_align(fd: int) -> int | None:
    """The unit of direct I/O on a file (STATX_DIOALIGN, since 6.1): offsets, lengths and memory.

    0: the file system has no direct I/O for it. None: the kernel or the file system does not tell.
    """
    statx = getattr(_libc, "statx", None)
    if statx is None:
        return None
    raw = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, raw) != 0:
        return None
    (mask,) = struct.unpack_from("I", raw)
    if not mask & STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("II", raw, _DIO_MEM_ALIGN)
    return max(memory, offset) if offset else 0


_memcmp = _libc.memcmp  # called through ctypes, it runs without the interpreter's lock
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcmp.restype = ctypes.c_int


class Buffer:
    """Page-aligned memory for direct I/O, to be reused: its pages are touched once."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self.size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages; small ones do
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.array = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(self.array.ctypes.data)

    def is_zero(self, start: int, length: int) -> bool:
        """Whether `length` bytes from `start` are all zero. Stops at the first that is not."""
        self._check(start, length)
        if length == 0:
            return True
        at = self.address + start
        # Each byte equals the one before it, and the first is zero.
        return not self.view[start] and int(_memcmp(at, at + 1, length - 1)) == 0

    def equal(self, start: int, length: int, other: Buffer, other_start: int) -> bool:
        """Whether two ranges hold the same bytes."""
        self._check(start, length)
        other._check(other_start, length)
        return int(_memcmp(self.address + start, other.address + other_start, length)) == 0

    def _check(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"{start}+{length} is outside a buffer of {self.size} bytes")


def is_zero(data: memoryview | bytes) -> bool:
    """Whether all bytes are zero."""
    array = np.frombuffer(data, dtype=np.uint8)
    if not len(array):
        return True
    at = int(array.ctypes.data)
    return int(array[0]) == 0 and int(_memcmp(at, at + 1, len(array) - 1)) == 0


def equal(one: memoryview | bytes, other: memoryview | bytes) -> bool:
    """Whether both hold the same bytes."""
    a, b = np.frombuffer(one, dtype=np.uint8), np.frombuffer(other, dtype=np.uint8)
    return len(a) == len(b) and _memcmp(int(a.ctypes.data), int(b.ctypes.data), len(a)) == 0
