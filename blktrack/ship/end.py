"""One end of a copy: what a block device and a file have in common, and how they fail."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

import numpy as np

from blktrack import linux
from blktrack.errors import CopyFailed
from blktrack.extent import Extent
from blktrack.linux import Buffer
from blktrack.ship.aio import RequestQueue
from blktrack.ship.plan import Piece
from blktrack.ship.runs import runs

# What a device or file system says to a way of zeroing that it does not have.
_CANNOT = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS}
_ZEROES = memoryview(Buffer(1 << 20).view).toreadonly()

_HINTS = {
    errno.ENOSPC: "free space there, then run the command again: it goes on where it stopped",
    errno.EDQUOT: "raise the quota there, then run the command again",
    errno.EFBIG: "put it where files may be that large, or raise the limit (ulimit -f), then run "
    "the command again",
    errno.EIO: "the medium or its connection fails: see the kernel log, then replace or check it",
    errno.EBUSY: "end what uses it, then run the command again",
    errno.ETXTBSY: "it is a program that runs: choose another replica",
    errno.ENOENT: "check its name; mount or connect what it lies on",
    errno.EACCES: "run as root, and make it writable",
    errno.EPERM: "run as root, and take off its write protection (of a file, see lsattr)",
    errno.EROFS: "make it writable",
    errno.ENXIO: "the device is gone or has shrunk: connect it, then run the command again",
    errno.ENODEV: "the device is gone: connect it, then run the command again",
}


class EndError(CopyFailed):
    """One end failed at `extent`, or as a whole where it is None; `errno` says how."""

    def __init__(self, path: str, doing: str, extent: Extent | None, error: OSError) -> None:
        where = f"{path} at {extent}" if extent else path
        super().__init__(
            f"cannot {doing} {where}: {os.strerror(error.errno) if error.errno else error}",
            hint=_HINTS.get(error.errno or 0, "see the kernel log"),
        )
        self.path = path
        self.extent = extent
        self.errno = error.errno or 0


class Endpoint(ABC):
    """Bytes 0 to `size` at `path`; direct I/O comes in multiples of `align` (1: there is none).

    Ranges may be any for a file; those written to a device must be multiples of `align`. A buffer
    must lie in memory as its range lies in its page. Errors are EndError.
    """

    def __init__(self, path: str, size: int, align: int) -> None:
        self.path = path
        self.size = size
        self.align = align
        self._direct = -1
        self._zero_ways: list[Callable[[int, int], None]] = []

    @abstractmethod
    def _read(self, view: memoryview, offset: int) -> None: ...

    @abstractmethod
    def _write(self, view: memoryview, offset: int) -> None: ...

    @abstractmethod
    def _sync(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on."""
        try:
            self._read(view, offset)
        except OSError as error:
            self._fail("read", offset, len(view), error)

    def read(self, offset: int, length: int) -> bytes:
        """A copy of some bytes, for a few of them."""
        shift = offset % linux.PAGE
        view = Buffer(shift + length).view[shift : shift + length]
        self.read_into(view, offset)
        return bytes(view)

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at `offset`; durable after flush()."""
        try:
            self._write(view, offset)
        except OSError as error:
            self._fail("write", offset, len(view), error)

    def zero(self, start: int, length: int) -> None:
        """Make a range read as zeroes, freeing its space if this end can; durable after flush()."""
        ways = self._zero_ways
        for index, way in enumerate(ways):
            try:
                way(start, length)
            except OSError as error:
                if error.errno in _CANNOT and way is not ways[-1]:
                    continue
                self._fail("zero", start, length, error)
            if index:
                self._zero_ways = ways[index:]
            return

    def read_many(
        self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
    ) -> list[Piece]:
        """Read many pieces at once; those that failed, or could not be read this way."""
        return self._many(pieces, buffer, requests, write=False)

    def write_many(
        self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
    ) -> None:
        """Write many pieces at once; durable after flush()."""
        for start, length, at in self._many(pieces, buffer, requests, write=True):
            self.write(buffer.view[at : at + length], start)

    def read_all(self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None) -> None:
        """Read many pieces, at once if there are requests for it."""
        for start, length, at in self.read_many(pieces, buffer, requests):
            self.read_into(buffer.view[at : at + length], start)

    def differences(
        self,
        pieces: list[Piece],
        source: Buffer,
        replica: Buffer,
        requests: RequestQueue | None,
        granularity: int,
    ) -> list[Piece]:
        """Runs of granules in which this end is not what `source` holds at the pieces' places.

        What is here is read into `replica`, at the same places.
        """
        self.read_all(pieces, replica, requests)
        found = []
        for start, length, at in pieces:
            if source.equal(at, length, replica, at):  # mostly: in one go
                continue
            shift = at - start
            for begin, end, equal in runs(
                start,
                start + length,
                granularity,
                shift,
                lambda at, count: source.equal(at, count, replica, at),
            ):
                if not equal:
                    found.append(Piece(begin, end - begin, begin + shift))
        return found

    def _many(
        self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None, *, write: bool
    ) -> list[Piece]:
        rows = np.array(pieces, dtype=np.int64).reshape(-1, 3)
        if requests is None or self.align == 1 or ((rows[:, 0] | rows[:, 1]) % self.align).any():
            return pieces
        moved = requests.move(self._direct, buffer, rows, write=write)
        # Short ones too: the plain call goes on to the end or says why it cannot.
        return [pieces[index] for index in np.flatnonzero(moved != rows[:, 1])]

    def _write_zeroes(self, start: int, length: int) -> None:
        end = start + length
        while start < end:
            shift = start % linux.PAGE
            piece = min(end - start, len(_ZEROES) - shift)
            self._write(_ZEROES[shift : shift + piece], start)
            start += piece

    def flush(self) -> None:
        """Make everything written and zeroed before this call durable."""
        try:
            self._sync()
        except OSError as error:
            raise EndError(self.path, "flush", None, error) from error

    def _fail(self, doing: str, start: int, length: int, error: OSError) -> NoReturn:
        raise EndError(self.path, doing, Extent(start, length), error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
