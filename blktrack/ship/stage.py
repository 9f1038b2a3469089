"""A staged increment: what leads a replica to its next point, kept beside it until it is in.

    incoming.pack       the data: see `pack`
    incoming.index      what it covers, and where that is: rows of little-endian 64-bit numbers
    incoming.json       its header, written last: what makes the stage sealed
    incoming.part       of a stage that is kept unsealed: its journal, see `partial`

The seal is the commit: a stage without a header is as good as absent, one with a header is complete
and durable. A header goes before what it speaks of, so a stage that is being dropped is never taken
for a complete one.

A stage that is filled from another host outlives the connection, and its process: it is made to be
kept, and has a journal. At a checkpoint the pack becomes durable, then what the journal says of it,
in this order, so what the journal says can be relied on after a death or a power cut. The next
connection goes on behind that. Once there is a header nobody reads the journal any more; it is the
first to go, so that what is left of a stage that was dropped is not taken for one to go on with.

What is read is checked first: see `header`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from blktrack import crash, extent
from blktrack.durable import make_directory, sync_directory, write_bytes
from blktrack.errors import BlktrackError
from blktrack.extent import ExtentArray
from blktrack.point import Point
from blktrack.ship import partial
from blktrack.ship.endpoint import FileEnd
from blktrack.ship.header import HEADER, INDEX, Header, StageDamaged, read_index
from blktrack.ship.overridden import give_back
from blktrack.ship.pack import Index, Packer, joined, resolve
from blktrack.ship.partial import JOURNAL, Journal, Partial
from blktrack.ship.record import Record

PACK = "incoming.pack"
# What a death while one of them was written leaves behind.
_FILES = (JOURNAL, INDEX, PACK, f".{INDEX}.new", f".{HEADER}.new")


class Stage:
    """A stage that is being filled, or is sealed. A context manager: unsealed, it is dropped,
    unless it was made to be kept."""

    file: FileEnd  # the pack
    end: Packer  # what is copied here is staged
    size: int  # of the source
    link: str
    base: Point
    header: Header | None  # None: not sealed
    index: Index  # once sealed
    id: str  # uuid of one that is kept; ""

    def __init__(self, folder: Path, file: FileEnd, end: Packer, link: str, base: Point) -> None:
        self.file = file
        self.end = end
        self.size = end.size
        self.link = link
        self.base = base
        self.header = None
        self.index = np.empty((0, 3), dtype=np.int64)
        self.id = ""
        self._folder = folder
        self._dropped = False
        self._journal: Journal | None = None
        self._noted = 0  # rows that the journal has
        # A failed flush may have dropped data, and the next one succeed: it is never asked again.
        self._failed: BlktrackError | None = None

    @property
    def bytes(self) -> int:
        """Of what is sealed, on the replica."""
        return int(self.index[:, 1].sum())

    @property
    def point(self) -> Point | None:
        """Where it leads, once it is sealed."""
        return self.header.point if self.header else None

    @property
    def mark(self) -> int:
        """How much of one that is kept is durable, in bytes of its journal. Where it is less than
        it was, something is missing: damaged, or of a file system that was set back."""
        return self._journal.end if self._journal else 0

    @property
    def staged(self) -> ExtentArray:
        """What one that is kept holds durably."""
        return extent.union(extent.empty(), self.end.index()[: self._noted, :2])

    @classmethod
    def create(
        cls,
        folder: Path,
        size: int,
        *,
        link: str,
        base: Point,
        keep: bool = False,
        most: int | None = None,
    ) -> Self:
        """An empty one. What was staged there before is dropped.

        size -- of the source. keep -- to be gone on with by `resume` if it is not sealed. most --
        bytes that it may take: TooMuchStaged where more is written to its end.
        """
        discard(folder)
        path, journal = folder / PACK, None
        head = Partial(str(uuid.uuid4()), link, base, size)
        try:
            make_directory(folder)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            if keep:
                journal = Journal.create(folder, head)
                sync_directory(folder)
        except OSError as error:
            with contextlib.suppress(BlktrackError):
                discard(folder)
            raise _failed("make", path, error) from error
        file = FileEnd(str(path), writable=True)
        stage = cls(folder, file, Packer(file, size, most=most), link, base)
        if journal is not None:
            stage._journal, stage.id = journal, head.id
        crash.point("stage-created")
        return stage

    @classmethod
    def resume(
        cls, folder: Path, *, link: str, base: Point, size: int, most: int | None = None
    ) -> Self | None:
        """The one that was kept there for this link, from this point, of a source of this size: as
        it was at its last checkpoint. None where there is none; nothing is dropped for that.

        Busy if another run has it.
        """
        head, path = partial.read_head(folder), folder / PACK
        if head is None or (head.link, head.base, head.size) != (link, base, size):
            return None
        if os.path.lexists(folder / HEADER) or not _is_file(path):
            return None
        with contextlib.ExitStack() as undo:
            file = FileEnd(str(path), writable=True)
            undo.callback(file.close)
            found = partial.read(folder, file.size)
            if found is None or found.partial != head:
                return None
            journal = Journal.resume(folder, found)
            undo.callback(journal.close)
            file.resize(found.packed)
            give_back(file.fileno(), found.rows, found.packed)
            stage = cls(folder, file, Packer(file, size, found.rows, most), link, base)
            stage._journal, stage._noted, stage.id = journal, len(found.rows), head.id
            undo.pop_all()
        crash.point("part-resumed")
        return stage

    @classmethod
    def find(cls, folder: Path, record: Record | None = None) -> Self | None:
        """The sealed one. One that is not sealed is dropped, unless it is kept for a replica of
        this record. StageDamaged."""
        header = Header.read(folder)
        if header is None:
            head = partial.read_head(folder)
            if head is None or record is None or not head.is_for(record):
                discard(folder)
            return None
        index = read_index(folder, header)
        path = folder / PACK
        try:
            info = path.lstat()
        except OSError as error:
            raise StageDamaged(folder, f"{PACK}: {error.strerror}") from error
        if not stat.S_ISREG(info.st_mode):
            raise StageDamaged(folder, f"{PACK} is not a file")
        if info.st_size != header.packed:
            raise StageDamaged(folder, f"{PACK} has {info.st_size} bytes of {header.packed}")
        if info.st_mtime_ns != header.written:
            raise StageDamaged(folder, f"{PACK} was written to since it was sealed")
        file = FileEnd(str(path))
        stage = cls(folder, file, Packer(file, header.size), header.link, header.base)
        stage.header, stage.index = header, index
        return stage

    def leads_from(self, record: Record) -> bool:
        """Whether the replica of this record waits for this stage, or is in the middle of it."""
        return self.header is not None and self.header.leads_from(record)

    def checkpoint(self) -> None:
        """Make all that was written to `end` before this call durable, for `resume` to find.

        CopyFailed; then what earlier calls made durable is kept, and nothing more. ValueError for a
        stage that is not kept, or is sealed.
        """
        if self._journal is None or self.header is not None:
            raise ValueError("a checkpoint of a stage that is not kept, or is sealed")
        if self._failed is not None:
            raise self._failed
        rows, packed = self.end.settle(self._noted)
        if not len(rows):
            return
        try:
            self.end.flush_file()
            crash.point("part-flushed")
            self._journal.append(joined(rows), packed)
        except BlktrackError as error:
            self._failed = error
            raise
        self._noted += len(rows)
        crash.point("part-noted")

    def seal(self, extents: ExtentArray, point: Point) -> None:
        """Make what is staged durable, and with it that it leads to `point`.

        ValueError if it is not all of `extents` and nothing else.
        """
        if self._failed is not None:
            raise self._failed
        index = resolve(self.end.index())
        if not np.array_equal(extent.union(extent.empty(), index[:, :2]), extents):
            raise ValueError("what is staged are not the extents that were to be")
        try:
            packed = self.end.finish()
        except BlktrackError as error:
            self._failed = error
            raise
        crash.point("stage-flushed")
        data = index.astype("<i8").tobytes()
        write_bytes(self._folder / INDEX, data)  # the pack's name becomes durable with it
        crash.point("stage-listed")
        header = Header(
            link=self.link,
            base=self.base,
            point=point,
            size=self.size,
            packed=packed,
            extents=len(index),
            digest="",
            written=os.fstat(self.file.fileno()).st_mtime_ns,
        )
        header = replace(header, digest=header.over(data))
        header.write(self._folder)
        self.header, self.index = header, index
        crash.point("stage-sealed")

    def drop(self) -> None:
        """Give up what is staged and free its space."""
        self._dropped = True
        self._close_files()
        discard(self._folder)

    def close(self) -> None:
        """What is sealed is kept, and what was made to be kept, if that can be, as it is now."""
        kept = self.header is not None or self._journal is not None
        if self._journal is not None and self.header is None and not self._dropped:
            with contextlib.suppress(BlktrackError):
                self.checkpoint()
        self._close_files()
        if not kept and not self._dropped:
            discard(self._folder)

    def _close_files(self) -> None:
        self.file.close()
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Why it came to nothing must not be hidden by a folder that could not be cleared.
        with contextlib.suppress(*[BlktrackError] if kind else []):
            self.close()


def is_left(folder: Path) -> bool:
    """Whether anything was staged there and neither finished nor dropped."""
    return any(os.path.lexists(folder / name) for name in (HEADER, *_FILES))


def is_due(folder: Path) -> bool:
    """Whether what is left there is to be finished, or dropped: one that is kept for who fills it
    is neither. To be found out without a lock, it is not known for long."""
    if os.path.lexists(folder / HEADER):
        return True
    return is_left(folder) and partial.read_head(folder) is None


def discard(folder: Path) -> None:
    """Remove whatever is staged there: its journal, its header, and then what they speak of."""
    if not is_left(folder):
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            (folder / JOURNAL).unlink()
            sync_directory(folder)
            crash.point("part-dropped")
        with contextlib.suppress(FileNotFoundError):
            (folder / HEADER).unlink()
            sync_directory(folder)
            crash.point("stage-unsealed")
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        sync_directory(folder)
    except OSError as error:
        raise _failed("remove", folder / HEADER, error) from error
    crash.point("stage-dropped")


def _is_file(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def _failed(doing: str, path: Path, error: OSError) -> BlktrackError:
    return BlktrackError(
        f"cannot {doing} {path}: {error.strerror}",
        hint="free space on that file system or make it writable, then run the command again",
    )
