"""The journal of a stage that is not sealed yet: what whoever goes on with it finds there.

    incoming.part       frames: a head (whose it is, where it starts), then batches of rows of the
                        index, in the order in which they came

A batch is written when the pack that it needs is durable, and is durable itself before anybody is
told. So what a whole frame says is in the pack, whatever died in between. Behind the last whole
frame both files may hold anything: who goes on cuts them there.

The digest of a frame is over those before it too: one that was left behind by another history of
the file is none of this. A frame that is damaged ends the journal: less is kept. That less is there
shows in its length, which its user was told: what was staged twice would still be covered, by what
came first. With a damaged head nothing is kept. All that is read is checked first, and no memory is
taken by a number that was only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from blktrack import crash
from blktrack.linux import PAGE
from blktrack.point import Point
from blktrack.ship.end import EndError
from blktrack.ship.header import MOST_HEADER, number, point_of, text
from blktrack.ship.pack import ROW, Index, fault_of_rows
from blktrack.ship.record import Record, State
from blktrack.units import SECTOR

JOURNAL = "incoming.part"
FORMAT = 1
_FRAME = struct.Struct("<QQ")  # bytes of what follows, without its digest; length of the pack
_DIGEST = 20
_ROWS = 40_000  # of one batch; a checkpoint of more is several
_LEAST = _FRAME.size + ROW + _DIGEST  # bytes of a batch
_SLACK = 1 << 20


@dataclass(frozen=True)
class Partial:
    """Whose a stage is that is not sealed."""

    id: str  # uuid
    link: str  # uuid of the link that it is for
    base: Point  # where it starts
    size: int  # of the source, in bytes

    def is_for(self, record: Record) -> bool:
        """Whether it may still become the next point of the replica of this record."""
        if record.state is not State.READY:
            return False
        return (self.link, self.base) == (record.link, record.point)


@dataclass(frozen=True)
class Found:
    """A journal as it was read: what it says, and where its last whole frame ends."""

    partial: Partial
    rows: Index  # as they were written
    packed: int  # length of the pack that they need
    end: int
    digest: bytes


class _Frame(NamedTuple):
    data: bytes
    packed: int
    end: int
    digest: bytes


class Journal:
    """Open to be appended to, by one thread."""

    end: int  # bytes of it that are durable

    def __init__(self, path: Path, fd: int, digest: bytes, end: int) -> None:
        self._path = path
        self._fd = fd
        self._digest = digest
        self.end = end

    @classmethod
    def create(cls, folder: Path, partial: Partial) -> Self:
        """A new one, durable once its folder is. OSError."""
        path = folder / JOURNAL
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        journal = cls(path, os.open(path, flags, 0o600), b"", 0)
        try:
            data = json.dumps({"format": FORMAT, **asdict(partial)}).encode()
            journal._put([journal._frame(data, 0)])
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def resume(cls, folder: Path, found: Found) -> Self:
        """The one that was found; what it says is durable then, and nothing follows. EndError."""
        path = folder / JOURNAL
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.ftruncate(fd, found.end)
                os.fsync(fd)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            raise EndError(str(path), "resume", None, error) from error
        return cls(path, fd, found.digest, found.end)

    def append(self, rows: Index, packed: int) -> None:
        """Rows whose data is durable in the first `packed` bytes of the pack; durable on return.

        EndError; then no more may be appended: it could follow half a frame.
        """
        parts = [rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS)]
        try:
            self._put([self._frame(part.astype("<i8").tobytes(), packed) for part in parts])
        except OSError as error:
            raise EndError(str(self._path), "write", None, error) from error

    def _frame(self, data: bytes, packed: int) -> bytes:
        head = _FRAME.pack(len(data), packed)
        self._digest = _over(self._digest, head, data)
        return head + data + self._digest

    def _put(self, frames: list[bytes]) -> None:
        left = memoryview(b"".join(frames))
        length = len(left)
        while left:
            left = left[os.write(self._fd, left) :]
        crash.point("part-written")
        os.fdatasync(self._fd)
        self.end += length

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_head(folder: Path) -> Partial | None:
    """Whose the partial stage there is; None if there is none, or its head is damaged."""
    with contextlib.suppress(OSError), _opened(folder) as file:
        for frame in _frames(file):
            return _head(frame)
    return None


def read(folder: Path, room: int) -> Found | None:
    """The journal there, as far as it is whole and a pack of `room` bytes has what it needs."""
    with contextlib.suppress(OSError), _opened(folder) as file:
        frames = _frames(file)
        first = next(frames, None)
        partial = _head(first) if first else None
        if first is None or partial is None:
            return None
        # A page for each row of data, and zeroes once for each sector.
        most = _SLACK + _LEAST * (room // PAGE + partial.size // SECTOR)
        last, found = first, [np.empty((0, 3), dtype=np.int64)]
        for frame in frames:
            if not last.packed <= frame.packed <= room or frame.packed % PAGE or frame.end > most:
                break
            if not frame.data or len(frame.data) % ROW:
                break
            rows = np.frombuffer(frame.data, dtype="<i8").astype(np.int64).reshape(-1, 3)
            if fault_of_rows(rows, partial.size, frame.packed):
                break
            last = frame
            found.append(rows)
        return Found(partial, np.concatenate(found), last.packed, last.end, last.digest)
    return None


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[BinaryIO]:
    """The journal there, if it is a file. OSError."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    with open(
        folder / JOURNAL, "rb", opener=lambda name, mode: os.open(name, mode | flags)
    ) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileNotFoundError
        yield file


def _frames(file: BinaryIO) -> Iterator[_Frame]:
    """Those that are whole, up to the first that is not."""
    digest, end = b"", 0
    while len(head := file.read(_FRAME.size)) == _FRAME.size:
        length, packed = _FRAME.unpack(head)
        if length > (_ROWS * ROW if digest else MOST_HEADER) or packed >= 1 << 63:
            return
        data, given = file.read(length), file.read(_DIGEST)
        digest = _over(digest, head, data)
        if given != digest:
            return
        end += _FRAME.size + length + _DIGEST
        yield _Frame(data, packed, end, digest)


def _over(before: bytes, head: bytes, data: bytes) -> bytes:
    sum_ = hashlib.blake2b(before, digest_size=_DIGEST)
    sum_.update(head)
    sum_.update(data)
    return sum_.digest()


def _head(frame: _Frame) -> Partial | None:
    """One of a newer version is as good as none: what it holds comes again."""
    try:
        value = json.loads(frame.data)
        if number(value, "format") > FORMAT:
            return None
        return Partial(
            id=text(value, "id"),
            link=text(value, "link"),
            base=point_of(value["base"]),
            size=number(value, "size"),
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
