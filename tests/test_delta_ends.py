"""What a delta ends in: writes that its writer refuses, files that fail, and what follows it."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blktrack.ship.delta import (
    DeltaBroken,
    DeltaInvalid,
    DeltaNewer,
    DeltaReader,
    DeltaTruncated,
    DeltaWriter,
    Header,
)
from tests import second_reader
from tests.delta_examples import BASE, HEADER, POINT, SIZE, frames_of, header_of, written

# The writer writes nothing that no reader takes.


@pytest.mark.parametrize(
    ("start", "length"), [(0, 0), (5, -1), (-1, 5), (0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2)]
)
def test_writer_keeps_to_the_source(start: int, length: int) -> None:
    writer = DeltaWriter(io.BytesIO(), HEADER)
    for act in (writer.zero, writer.discard):
        with pytest.raises(ValueError, match="is not within 20000 bytes"):
            act(start, length)
    with pytest.raises(ValueError, match="is not within 20000 bytes"):
        writer.data(start, bytes(max(length, 0)))


def test_nothing_follows_the_end() -> None:
    writer = DeltaWriter(io.BytesIO(), HEADER)
    writer.end(POINT)
    for act in (lambda: writer.zero(0, 1), lambda: writer.end(POINT)):
        with pytest.raises(ValueError, match="has ended"):
            act()


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (replace(HEADER, link="../../etc"), "link"),
        (replace(HEADER, granularity=4097), "granularity"),
        (header_of(0), "size"),
        (replace(HEADER, source=replace(HEADER.source, name="a\nb")), "name"),
        (replace(HEADER, time=float("inf")), "unique keys"),
        (replace(HEADER, time=-1.0), "time"),
        (replace(HEADER, base=replace(BASE, epoch=2**63)), "epoch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_writer_refuses_a_bad_header(header: Header, key: str) -> None:
    with pytest.raises(DeltaInvalid, match=key):
        DeltaWriter(io.BytesIO(), header)


def test_writer_refuses_a_bad_point_and_may_end_with_a_good_one() -> None:
    file = io.BytesIO()
    writer = DeltaWriter(file, HEADER)
    with pytest.raises(DeltaNewer, match="consistency 'quantum'"):
        writer.end(replace(POINT, consistency="quantum"))
    writer.end(POINT)
    second_reader.parse(file.getvalue())


# Files that fail.


def test_reader_gone_away() -> None:
    source, sink = os.pipe()
    with open(sink, "wb", buffering=0) as file:
        writer = DeltaWriter(file, HEADER)
        os.close(source)
        with pytest.raises(DeltaBroken, match="whoever was to take the delta went away") as caught:
            writer.data(0, bytes(SIZE))
            writer.flush()
        assert caught.value.exit_code == 1
        for act in (writer.flush, lambda: writer.end(POINT)):
            with pytest.raises(DeltaBroken, match="went away"):
                act()


def test_no_space_left() -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        with pytest.raises(DeltaBroken, match="cannot write the delta: No space left") as caught:
            DeltaWriter(file, HEADER)
        assert caught.value.hint


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(DeltaBroken, match="cannot read the delta: Is a directory"):
        DeltaReader(Descriptor(descriptor))
    os.close(descriptor)


class Descriptor(io.RawIOBase):
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def readinto(self, buffer: Any) -> int:
        return os.readv(self._descriptor, [buffer])


def test_a_signal_in_between_leaves_no_writer_that_goes_on() -> None:
    class Interrupting(io.BytesIO):
        armed = False

        def write(self, data: Any) -> int:
            if self.armed:
                super().write(memoryview(data)[:10])
                raise KeyboardInterrupt
            return super().write(data)

    file = Interrupting()
    writer = DeltaWriter(file, HEADER)
    file.armed = True
    with pytest.raises(KeyboardInterrupt):
        writer.data(0, bytes(SIZE))
        writer.flush()
    file.armed = False
    with pytest.raises(DeltaBroken, match="cannot write the delta: Interrupted"):
        writer.end(POINT)


# What follows the trailer.


def test_what_follows_is_left_in_the_pipe() -> None:
    stream = written()
    file = io.BytesIO(stream + stream + b"rest")
    for _ in range(2):
        reader = DeltaReader(file)
        assert list(frames_of(reader)) == second_reader.parse(stream).frames
    assert file.read() == b"rest"


def test_what_follows_is_refused_where_nothing_may() -> None:
    stream = written()
    reader = DeltaReader(io.BytesIO(stream + b"\0"))
    with pytest.raises(ValueError, match="not been read to its end"):
        reader.expect_end()
    list(reader)
    with pytest.raises(DeltaInvalid, match=f"something follows its trailer, at byte {len(stream)}"):
        reader.expect_end()


def test_no_trailer_before_the_end() -> None:
    reader = DeltaReader(io.BytesIO(written()))
    for _ in range(4):
        next(reader)
        with pytest.raises(ValueError, match="not been read to its end"):
            _ = reader.trailer
    assert list(reader) == []
    assert reader.trailer.point == POINT
    assert list(reader) == []


def test_a_refused_delta_stays_refused() -> None:
    reader = DeltaReader(io.BytesIO(written()[:-1]))
    with pytest.raises(DeltaTruncated):
        list(reader)
    with pytest.raises(ValueError, match="refused before"):
        next(reader)
    with pytest.raises(ValueError, match="not been read to its end"):
        _ = reader.trailer
