"""The two ends of a copy: a block device or a file, read and written past the page cache.

A buffered read of a mounted device can return what its file system replaced long ago, so devices
are only ever met with O_DIRECT. Files are too where their file system can; the part of a range that
its direct I/O cannot express, or all of it, goes through a second, buffered descriptor. The two
never meet in one page: a page is direct only if one range covers it whole.

An end serves several threads at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator

from blktrack import linux
from blktrack.errors import Busy
from blktrack.extent import Extent
from blktrack.linux import Buffer
from blktrack.ship.end import EndError, Endpoint

__all__ = ["DeviceEnd", "EndError", "Endpoint", "FileEnd", "open_end"]


class DeviceEnd(Endpoint):
    """A block device. Opened for writing it is claimed: the kernel then refuses to mount it."""

    def __init__(self, path: str, *, writable: bool = False) -> None:
        flags = os.O_RDWR | os.O_EXCL if writable else os.O_RDONLY
        try:
            fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise EndError(path, "open", None, error) from error
        super().__init__(path, linux.device_size(fd), linux.block_size(fd))
        self._direct = fd
        self._zero_ways = [self._punch, self._zero_out, self._write_zeroes]

    def fileno(self) -> int:
        return self._direct

    def _read(self, view: memoryview, offset: int) -> None:
        if (offset | len(view)) % self.align == 0:
            _read_all(self._direct, view, offset)
            return
        first = offset // self.align * self.align
        last = -(-(offset + len(view)) // self.align) * self.align
        whole = Buffer(last - first).view[: last - first]
        _read_all(self._direct, whole, first)
        view[:] = whole[offset - first :][: len(view)]

    def _write(self, view: memoryview, offset: int) -> None:
        self._check(offset, len(view))
        _write_all(self._direct, view, offset)

    def _punch(self, start: int, length: int) -> None:
        self._check(start, length)
        linux.punch_hole(self._direct, start, length)

    def _zero_out(self, start: int, length: int) -> None:
        linux.zero_out(self._direct, start, length)

    def _check(self, start: int, length: int) -> None:
        if (start | length) % self.align:
            raise ValueError(f"{Extent(start, length)} is not in blocks of {self.align}")

    def _sync(self) -> None:
        os.fsync(self._direct)

    def close(self) -> None:
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1


class FileEnd(Endpoint):
    """A regular file, locked while it is open, alone if to be written. Busy if another holds it."""

    def __init__(self, path: str, *, writable: bool = False) -> None:
        mode = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            # Links were resolved where it was looked at whether this may be written: one that is
            # there now was put there since.
            self._fd = os.open(path, mode | (os.O_NOFOLLOW if writable else 0))
        except OSError as error:
            raise EndError(path, "open", None, error) from error
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise Busy(f"{path} is held by another run", hint="wait for it to end") from error
        direct, align = _open_direct(self._fd, mode)
        super().__init__(path, os.fstat(self._fd).st_size, align)
        self._direct = direct
        self._zero_ways = [self._punch, self._write_zeroes]

    def fileno(self) -> int:
        return self._fd

    def resize(self, size: int) -> None:
        """Grow with a hole, or cut; durable on return."""
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        except OSError as error:
            raise EndError(self.path, "resize", None, error) from error
        self.size = size

    def _read(self, view: memoryview, offset: int) -> None:
        self._each(_read_all, view, offset)

    def _write(self, view: memoryview, offset: int) -> None:
        self._each(_write_all, view, offset)

    def _each(
        self, move: Callable[[int, memoryview, int], None], view: memoryview, offset: int
    ) -> None:
        for direct, start, end in self._parts(offset, offset + len(view)):
            part = view[start - offset : end - offset]
            if direct:
                try:
                    move(self._direct, part, start)
                    continue
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.align = 1  # the file system took O_DIRECT at open, but not for this
            move(self._fd, part, start)

    def _parts(self, start: int, end: int) -> Iterator[tuple[bool, int, int]]:
        """(direct, start, end) of the head, whole units and tail of a range."""
        align = self.align
        first, last = -(-start // align) * align, end // align * align
        if align == 1 or first >= last:
            yield False, start, end
            return
        if start < first:
            yield False, start, first
        yield True, first, last
        if last < end:
            yield False, last, end

    def _punch(self, start: int, length: int) -> None:
        linux.punch_hole(self._fd, start, length)

    def _sync(self) -> None:
        os.fsync(self._fd)  # with the modification time, which tells of writes by others

    def close(self) -> None:
        for fd in (self._direct, self._fd):
            if fd >= 0:
                os.close(fd)
        self._direct = self._fd = -1


def _open_direct(fd: int, mode: int) -> tuple[int, int]:
    """A second descriptor for direct I/O and its unit; (-1, 1) if the file system has none."""
    align = linux.direct_align(fd)
    if align == 0:
        return -1, 1
    with contextlib.suppress(OSError):
        # Through /proc the very same file is opened, whatever its name means by now.
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_DIRECT), max(align or 0, linux.PAGE)
    return -1, 1


def open_end(path: str, *, writable: bool = False) -> Endpoint:
    """The end at `path`, a device or a file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise EndError(path, "open", None, error) from error
    if stat.S_ISBLK(mode):
        return DeviceEnd(path, writable=writable)
    return FileEnd(path, writable=writable)


def _read_all(fd: int, view: memoryview, offset: int) -> None:
    done = os.preadv(fd, [view], offset)
    while done < len(view):
        more = os.preadv(fd, [view[done:]], offset + done)
        if more == 0:
            raise OSError(errno.ENXIO, "the end came early")
        done += more


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = os.pwritev(fd, [view], offset)
    while done < len(view):
        done += os.pwritev(fd, [view[done:]], offset + done)
