"""A staged increment: what leads a replica to its next point, kept beside it until it is in.

    incoming.pack       the data: see `pack`
    incoming.index      what it covers, and where that is: rows of little-endian 64-bit numbers
    incoming.json       its header, written last: what makes the stage sealed

The seal is the commit: a stage without a header is as good as absent, one with a header is complete
and durable. A header is the first to go, so a stage that is being dropped is never taken for a
complete one.

What is read is checked first: see `header`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from blktrack import crash, extent
from blktrack.durable import make_directory, sync_directory, write_bytes
from blktrack.errors import BlktrackError
from blktrack.extent import ExtentArray
from blktrack.point import Point
from blktrack.ship.endpoint import FileEnd
from blktrack.ship.header import HEADER, INDEX, Header, StageDamaged, read_index
from blktrack.ship.pack import Index, Packer, resolve
from blktrack.ship.record import Record

PACK = "incoming.pack"
# What a death while one of them was written leaves behind.
_FILES = (INDEX, PACK, f".{INDEX}.new", f".{HEADER}.new")


class Stage:
    """A stage that is being filled, or is sealed. A context manager: unsealed, it is dropped."""

    file: FileEnd  # the pack
    end: Packer  # what is copied here is staged
    size: int  # of the source
    link: str
    base: Point
    header: Header | None  # None: not sealed
    index: Index  # once sealed

    def __init__(self, folder: Path, file: FileEnd, size: int, link: str, base: Point) -> None:
        self.file = file
        self.end = Packer(file, size)
        self.size = size
        self.link = link
        self.base = base
        self.header = None
        self.index = np.empty((0, 3), dtype=np.int64)
        self._folder = folder
        self._dropped = False

    @property
    def bytes(self) -> int:
        """Of what is sealed, on the replica."""
        return int(self.index[:, 1].sum())

    @property
    def point(self) -> Point | None:
        """Where it leads, once it is sealed."""
        return self.header.point if self.header else None

    @classmethod
    def create(cls, folder: Path, size: int, *, link: str, base: Point) -> Self:
        """An empty one. What was staged there before is dropped."""
        discard(folder)
        path = folder / PACK
        try:
            make_directory(folder)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _failed("make", path, error) from error
        stage = cls(folder, FileEnd(str(path), writable=True), size, link, base)
        crash.point("stage-created")
        return stage

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """The sealed one. One that is not sealed is dropped. StageDamaged."""
        header = Header.read(folder)
        if header is None:
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
        stage = cls(folder, FileEnd(str(path)), header.size, header.link, header.base)
        stage.header, stage.index = header, index
        return stage

    def leads_from(self, record: Record) -> bool:
        """Whether the replica of this record waits for this stage, or is in the middle of it."""
        return self.header is not None and self.header.leads_from(record)

    def seal(self, extents: ExtentArray, point: Point) -> None:
        """Make what is staged durable, and with it that it leads to `point`.

        ValueError if it is not all of `extents` and nothing else.
        """
        index = resolve(self.end.index())
        if not np.array_equal(extent.union(extent.empty(), index[:, :2]), extents):
            raise ValueError("what is staged are not the extents that were to be")
        packed = self.end.finish()
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
        self.file.close()
        self._dropped = True
        discard(self._folder)

    def close(self) -> None:
        """What is sealed is kept."""
        self.file.close()
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
