"""A staged increment: what leads a replica to its next point, kept beside it until it is in.

    incoming.img        an overlay: sparse, of the source's size, the data at its own offsets
    incoming.extents    the extents that it covers: pairs of little-endian 64-bit numbers
    incoming.json       its header, written last: what makes the stage sealed

A range that is covered and a hole in the overlay is to be zero. The seal is the commit: a stage
without a header is as good as absent, one with a header is complete and durable. A header is the
first to go, so a stage that is being dropped is never taken for a complete one.

What is read is checked first: see `header`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Self

from blktrack import crash
from blktrack.durable import make_directory, sync_directory, write_bytes
from blktrack.errors import BlktrackError
from blktrack.extent import ExtentArray, empty
from blktrack.point import Point
from blktrack.ship.endpoint import FileEnd
from blktrack.ship.header import EXTENTS, HEADER, Header, StageDamaged, digest, fault, read_extents
from blktrack.ship.record import Record

IMAGE = "incoming.img"
# What a death while one of them was written leaves behind.
_FILES = (EXTENTS, IMAGE, f".{EXTENTS}.new", f".{HEADER}.new")


class Stage:
    """A stage that is being filled, or is sealed. A context manager: unsealed, it is dropped."""

    end: FileEnd  # the overlay
    size: int
    link: str
    base: Point
    header: Header | None  # None: not sealed
    extents: ExtentArray  # once sealed

    def __init__(self, folder: Path, end: FileEnd, link: str, base: Point) -> None:
        self.end = end
        self.size = end.size
        self.link = link
        self.base = base
        self.header = None
        self.extents = empty()
        self._folder = folder
        self._dropped = False

    @property
    def point(self) -> Point | None:
        """Where it leads, once it is sealed."""
        return self.header.point if self.header else None

    @classmethod
    def create(cls, folder: Path, size: int, *, link: str, base: Point) -> Self:
        """An empty one, all of which reads as zero: it need not be told of zeroes at first.

        What was staged there before is dropped.
        """
        discard(folder)
        path = folder / IMAGE
        try:
            make_directory(folder)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _failed("make", path, error) from error
        end = FileEnd(str(path), writable=True)
        stage = cls(folder, end, link, base)
        try:
            end.resize(size)
        except BaseException:
            stage.close()
            raise
        stage.size = size
        crash.point("stage-created")
        return stage

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """The sealed one. One that is not sealed is dropped. StageDamaged."""
        header = Header.read(folder)
        if header is None:
            discard(folder)
            return None
        extents = read_extents(folder, header)
        path = folder / IMAGE
        try:
            info = path.lstat()
        except OSError as error:
            raise StageDamaged(folder, f"{IMAGE}: {error.strerror}") from error
        if not stat.S_ISREG(info.st_mode):
            raise StageDamaged(folder, f"{IMAGE} is not a file")
        if info.st_size != header.size:
            raise StageDamaged(folder, f"{IMAGE} has {info.st_size} bytes of {header.size}")
        if info.st_mtime_ns != header.written:
            raise StageDamaged(folder, f"{IMAGE} was written to since it was sealed")
        stage = cls(folder, FileEnd(str(path)), header.link, header.base)
        stage.header, stage.extents = header, extents
        return stage

    def leads_from(self, record: Record) -> bool:
        """Whether the replica of this record waits for this stage, or is in the middle of it."""
        return self.header is not None and self.header.leads_from(record)

    def seal(self, extents: ExtentArray, point: Point) -> None:
        """Make the overlay durable, and with it that it leads to `point`. The extents are those
        that it covers: sorted, disjoint, within `size`."""
        if why := fault(extents, self.size):
            raise ValueError(why)
        self.end.flush()
        crash.point("stage-flushed")
        data = extents.astype("<i8").tobytes()
        write_bytes(self._folder / EXTENTS, data)  # the image's name becomes durable with it
        crash.point("stage-listed")
        header = Header(
            link=self.link,
            base=self.base,
            point=point,
            size=self.size,
            extents=len(extents),
            digest=digest(data),
            written=os.fstat(self.end.fileno()).st_mtime_ns,
        )
        header.write(self._folder)
        self.header, self.extents = header, extents
        crash.point("stage-sealed")

    def drop(self) -> None:
        """Give up what is staged and free its space."""
        self.end.close()
        self._dropped = True
        discard(self._folder)

    def close(self) -> None:
        """What is sealed is kept."""
        self.end.close()
        if self.header is None and not self._dropped:
            discard(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Why it came to nothing must not be hidden by a folder that could not be cleared.
        with contextlib.suppress(*[BlktrackError] if kind else []):
            self.close()


def is_left(folder: Path) -> bool:
    """Whether anything was staged there and neither finished nor dropped."""
    return any(os.path.lexists(folder / name) for name in (HEADER, *_FILES))


def discard(folder: Path) -> None:
    """Remove whatever is staged there, its header first."""
    if not is_left(folder):
        return
    try:
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


def _failed(doing: str, path: Path, error: OSError) -> BlktrackError:
    return BlktrackError(
        f"cannot {doing} {path}: {error.strerror}",
        hint="free space on that file system or make it writable, then run the command again",
    )
