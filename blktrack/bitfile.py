"""A set of granules in a file that is memory: what is stored survives the process at once."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from blktrack import bitmap, linux
from blktrack.bitmap import Indices, Words
from blktrack.errors import BlktrackError
from blktrack.extent import ExtentArray

Runs = Iterable[tuple[int, int]]

_SPARE = 64 << 20  # bytes free beyond a whole set: with so many no page is asked for beforehand
_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS}  # a file system without fallocate
_FEW = 16  # a set of which one word in so many is set, or less, keeps its memory when cleared
# The file begins with a bit for each page of words, as far as there are bits for: 1 PiB in granules
# of 4 KiB. What is never set of it takes no memory.
HEAD = 1 << 20
_PART = 1 << 17  # words read at once
_PAGE_WORDS = linux.PAGE // 8
_NOWHERE: Indices = np.empty(0, dtype=np.int64)


class BitFile:
    """A bitmap of granules in a file that is memory: stores survive the process at once.

    The file is sparse, and only pages that were reserved are ever looked at. Which ones these are
    is noted in the file itself: tmpfs may tell for a moment of a hole where there is data, while a
    page is moved elsewhere in memory (SEEK_DATA takes one that is in its place and not yet marked
    as up to date for a hole: mapping_seek_hole_data and folio_migrate_flags).

    FileNotFoundError if there is none and `create` is not set, BlktrackError for one that is too
    small, ValueError for more words than there can be.
    """

    def __init__(self, path: Path, words: int, *, create: bool = False) -> None:
        self.size = max(words, 1) * 8
        if self.size > HEAD * 8 * linux.PAGE:
            raise ValueError(f"a set of {words} words")
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
            if os.fstat(self._fd).st_size < HEAD + self.size:
                raise BlktrackError(
                    f"{path} is not the pending set of this device, but shorter",
                    hint="blktrack untrack its device, then track it: the next sync is a resync",
                )
            self._memory = mmap.mmap(self._fd, HEAD + self.size)
        except BaseException:
            os.close(self._fd)
            raise
        self._words: Words = np.frombuffer(self._memory, np.uint64, words, offset=HEAD)
        self._pages: Words = np.frombuffer(self._memory, np.uint64, _page_words(words))

    @property
    def words(self) -> Words:
        """All of them, not to be written to: see `reserve`."""
        view = self._words.view()
        view.flags.writeable = False
        return view

    @staticmethod
    def widen(path: Path, words: int) -> None:
        """Make a set longer; those who have it open go on with what they see of it."""
        if path.stat().st_size < HEAD + words * 8:
            os.truncate(path, HEAD + words * 8)

    def _truncate(self) -> None:
        try:
            os.ftruncate(self._fd, HEAD + self.size)
        except OSError as error:
            raise self._failed("make", error) from error

    def _failed(self, doing: str, error: OSError) -> BlktrackError:
        return BlktrackError(
            f"cannot {doing} the set of changes {self._path}: {error.strerror}",
            hint="free space on that file system or make it writable, then run the command again; "
            "no change is lost",
        )

    def reserve(self, index: Indices | None = None, runs: Runs = ()) -> Words:
        """Have memory for words about to be set, and set them in what is returned.

        index, runs -- numbers of words, and (first, count) of others; all words without either

        A store for which the file system has no page left kills the process with SIGBUS. So where
        it is nearly full pages are asked for beforehand; they count as data once stored to.
        """
        count = -(-self.size // linux.PAGE)
        pages = np.full(count, index is None)
        pages[(_NOWHERE if index is None else index) // _PAGE_WORDS] = True
        for first, length in runs:
            pages[first // _PAGE_WORDS : -(-(first + length) // _PAGE_WORDS)] = True
        wanted = np.zeros_like(self._pages)
        bitmap.set_bits(wanted, np.flatnonzero(pages))
        room = os.fstatvfs(self._fd)
        if room.f_bavail * room.f_frsize <= self.size + HEAD + _SPARE:
            self._allocate(wanted)
        bitmap.or_into(self._pages, wanted)
        return self._words

    def _allocate(self, pages: Words) -> None:
        try:
            linux.reserve(self._fd, 0, self._pages.nbytes)
            for start, length in bitmap.extents(pages, linux.PAGE, self.size).tolist():
                linux.reserve(self._fd, HEAD + start, length)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise self._failed("grow", error) from error

    def nonzero(self) -> Indices:
        """Numbers of the words that are set."""
        found = [bitmap.nonzero(part) + at for at, part in _parts(self._fd, len(self._words))]
        return np.concatenate(found) if found else _NOWHERE

    def clear_extents(self, granularity: int, size: int, done: ExtentArray) -> None:
        """Take away the granules wholly inside extents."""
        bitmap.clear_extents(self._words, granularity, size, done)

    def clear(self) -> None:
        """Take all bits away. What few of them lay in stays allocated until a set is left empty.

        The next few bits are then set in a tenth of the time that the kernel needs for new pages.
        """
        index = self.nonzero()
        if 0 < len(index) <= len(self._words) // _FEW:
            self._words[index] = 0
        else:
            linux.punch_hole(self._fd, HEAD, self.size)
            if _read(self._fd, 0, len(self._pages)).any():
                # Not the last if it is cut off: the set may be longer by now, and more be in it.
                bitmap.clear_range(self._pages, 0, self.size // linux.PAGE)

    def close(self) -> None:
        self._words = self._pages = np.empty(0, dtype=np.uint64)
        # An error on its way up may hold the words; it must not be replaced by one from here.
        with contextlib.suppress(BufferError):
            self._memory.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _page_words(words: int) -> int:
    """Words of the bits of the pages that so many words take."""
    return bitmap.words_for(max(-(-words // _PAGE_WORDS), 1))


def _parts(fd: int, words: int) -> Iterator[tuple[int, Words]]:
    """What is in the pages that are noted: number of the first word, words as they are.

    By reading: a look at a hole through memory takes a page for it, which may be the last.
    """
    pages = _read(fd, 0, _page_words(words))
    for first, count in bitmap.extents(pages, _PAGE_WORDS, words).tolist():
        for at in range(first, first + count, _PART):
            yield at, _read(fd, HEAD + at * 8, min(_PART, first + count - at))


def add(path: Path, target: Words) -> bool | None:
    """Add the set in a file, as it is, to `target`; whether it held any bit, None if there is none.

    It may be longer or shorter than `target`, and is not changed, as by mapping it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    found = False
    try:
        for at, part in _parts(fd, len(target)):
            target[at : at + len(part)] |= part
            found = found or bool(part.any())
    except OSError:  # cut off meanwhile
        return found
    finally:
        os.close(fd)
    return found


def _read(fd: int, at: int, words: int) -> Words:
    raw = os.pread(fd, words * 8, at)
    return np.frombuffer(raw, dtype=np.uint64, count=len(raw) // 8)
