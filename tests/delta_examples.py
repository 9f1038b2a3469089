"""An example of a delta, ways to write others, and what readers make of them in one form."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from blktrack.point import Point
from blktrack.ship.delta import (
    DeltaDamaged,
    DeltaError,
    DeltaForeign,
    DeltaInvalid,
    DeltaNewer,
    DeltaReader,
    DeltaTruncated,
    DeltaWriter,
    Header,
    Kind,
)
from blktrack.ship.record import Origin
from tests import second_reader
from tests.second_reader import ZERO

ROOT = Path(__file__).resolve().parent.parent
SIZE = 20000
BASE = Point(6, "8c7a5b1e-3d2f-4a60-9b58-1f0e2d3c4b5a", 1767225600.0, "crash")
HEADER = Header(
    link="0f8fad5b-d9cb-469f-a165-70867728950e",
    source=Origin("/dev/vdb", "serial:b1", SIZE, BASE.generation),
    granularity=4096,
    base=BASE,
    time=1767225660.25,
)
POINT = Point(7, BASE.generation, 1767225660.5, "crash")

WORDS: dict[type[DeltaError], str] = {
    DeltaForeign: second_reader.FOREIGN,
    DeltaTruncated: second_reader.TRUNCATED,
    DeltaDamaged: second_reader.DAMAGED,
    DeltaNewer: second_reader.NEWER,
    DeltaInvalid: second_reader.INVALID,
}

Write = Callable[[DeltaWriter], object]


def header_of(size: int) -> Header:
    return replace(HEADER, source=replace(HEADER.source, size=size))


def example(writer: DeltaWriter) -> None:
    """The example of docs/delta-format.md."""
    writer.data(4096, b"blktrack")
    writer.zero(8192, 4096)
    writer.discard(12288, 7712)
    writer.data(4096, b"BL")


def written(
    write: Write = example,
    *,
    size: int = SIZE,
    level: int | None = None,
    file: io.BytesIO | None = None,
) -> bytes:
    file = file or io.BytesIO()
    writer = DeltaWriter(file, header_of(size), level=level)
    write(writer)
    writer.end(POINT, rounds=2)
    assert writer.written == len(file.getvalue())
    return file.getvalue()


def frames_of(reader: DeltaReader) -> Iterator[tuple[int, int, bytes | int]]:
    """In the form of the second reader."""
    for frame in reader:
        assert 0 <= frame.start < frame.end <= reader.header.size
        content = frame.length if frame.data is None else bytes(frame.data)
        assert (frame.kind is Kind.DATA) == isinstance(content, bytes)
        yield int(frame.kind), frame.start, content


class Trickle(io.RawIOBase):
    """Gives a few bytes at a time."""

    def __init__(self, data: bytes, most: int = 3) -> None:
        self._file = io.BytesIO(data)
        self._most = most

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(memoryview(buffer)[: self._most])


Operation = tuple[int, int, bytes | int]


def perform(operations: list[Operation], size: int) -> Write:
    def write(writer: DeltaWriter) -> None:
        for kind, start, content in operations:
            if isinstance(content, bytes):
                writer.data(start, content[: size - start])
            elif kind == ZERO:
                writer.zero(start, min(content, size - start))
            else:
                writer.discard(start, min(content, size - start))

    return write


@contextmanager
def through_a_pipe(
    write: Write, size: int, level: int | None = None, *, blocking: bool = True
) -> Iterator[io.FileIO]:
    """The other end of a pipe into which a thread writes a delta."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, blocking)

    def run() -> None:
        with open(ends[1], "wb", buffering=0) as sink:
            writer = DeltaWriter(sink, header_of(size), level=level)
            write(writer)
            writer.end(POINT)

    thread = threading.Thread(target=run)
    with open(ends[0], "rb", buffering=0) as source:
        thread.start()
        yield source
    thread.join()
