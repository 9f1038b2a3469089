"""A set of granules in a file that is memory: what is stored survives the process at once."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np

from blktrack import bitmap, linux
from blktrack.bitmap import Indices, Words
from blktrack.errors import BlktrackError

_SPARE = 64 << 20  # bytes free beyond a whole set: with so many no page is asked for beforehand
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS}  # a file system without fallocate
_FEW = 16  # a set of which one word in so many is set, or less, keeps its memory when cleared


class BitFile:
    """A bitmap of granules in a file that is memory: stores survive the process at once.

    The file is sparse and only its data is ever scanned. FileNotFoundError if there is none and
    `create` is not set, BlktrackError for one that is too small.
    """

    def __init__(self, path: Path, words: int, *, create: bool = False) -> None:
        self.size = max(words, 1) * 8
        self._path = path
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._failed("open", error) from error
        try:
            if create:
                self._truncate()
            if os.fstat(self._fd).st_size < self.size:
                raise BlktrackError(
                    f"{path} is not the pending set of this device, but shorter",
                    hint="blktrack untrack its device, then track it: the next sync is a resync",
                )
            self._memory = mmap.mmap(self._fd, self.size)
        except BaseException:
            os.close(self._fd)
            raise
        self.words: Words = np.frombuffer(self._memory, dtype=np.uint64)[:words]

    @staticmethod
    def widen(path: Path, words: int) -> None:
        """Make a set longer; those who have it open go on with what they see of it."""
        if path.stat().st_size < words * 8:
            os.truncate(path, words * 8)

    def _truncate(self) -> None:
        try:
            os.ftruncate(self._fd, self.size)
        except OSError as error:
            raise self._failed("make", error) from error

    def _failed(self, doing: str, error: OSError) -> BlktrackError:
        return BlktrackError(
            f"cannot {doing} the set of changes {self._path}: {error.strerror}",
            hint="free space on that file system or make it writable, then run the command again; "
            "no change is lost",
        )

    def reserve(self, index: Indices | None = None) -> None:
        """Have memory for words about to be set: for all of them, or for those numbered in `index`.

        A store for which the file system has no page left kills the process with SIGBUS. So where
        it is nearly full pages are asked for beforehand; they count as data once stored to.
        """
        room = os.fstatvfs(self._fd)
        if room.f_bavail * room.f_frsize > self.size + _SPARE:
            return
        parts = [(0, self.size)]
        if index is not None and not (len(index) and int(index[-1]) >= len(self.words)):
            pages = np.unique(index * 8 // linux.PAGE).tolist()
            parts = [(page * linux.PAGE, linux.PAGE) for page in pages]
        try:
            for start, length in parts:
                linux.reserve(self._fd, start, min(length, self.size - start))
        except OSError as error:
            if error.errno not in _CANNOT:
                raise self._failed("grow", error) from error

    def nonzero(self) -> Indices:
        """Numbers of the words that are set."""
        found = []
        for start, length in linux.data_extents(self._fd):
            first, end = start // 8, -(-(start + length) // 8)
            found.append(bitmap.nonzero(self.words[first:end]) + first)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def clear(self) -> None:
        """Take all bits away. What few of them lay in stays allocated until a set is left empty.

        The next few bits are then set in a tenth of the time that the kernel needs for new pages.
        """
        index = self.nonzero()
        if 0 < len(index) <= len(self.words) // _FEW:
            self.words[index] = 0
        else:
            linux.punch_hole(self._fd, 0, self.size)

    def close(self) -> None:
        self.words = np.empty(0, dtype=np.uint64)
        # An error on its way up may hold the words; it must not be replaced by one from here.
        with contextlib.suppress(BufferError):
            self._memory.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
