"""The delta: the writer against the reader, against a second reader and against its page."""

from __future__ import annotations

import io
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blktrack.linux import PAGE
from blktrack.point import Point
from blktrack.ship.delta import (
    MAX_FRAME,
    Counts,
    DeltaBroken,
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
    Trailer,
)
from blktrack.ship.record import Origin
from tests import deltas, second_reader
from tests.second_reader import DATA, DISCARD, ZERO

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


def image_of(plain: second_reader.Plain, size: int) -> bytes:
    image = bytearray(b"\xee" * size)
    plain.apply(image)
    return bytes(image)


class Trickle(io.RawIOBase):
    """Gives a few bytes at a time."""

    def __init__(self, data: bytes, most: int = 3) -> None:
        self._file = io.BytesIO(data)
        self._most = most

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(memoryview(buffer)[: self._most])


class Stingy(io.RawIOBase):
    """Takes a few bytes at a time."""

    def __init__(self, most: int = 7) -> None:
        self.data = bytearray()
        self._most = most

    def write(self, data: Any) -> int:
        self.data += memoryview(data)[: self._most]
        return min(len(data), self._most)


# What comes out is what went in.


def test_the_example() -> None:
    reader = DeltaReader(io.BytesIO(written()))
    assert reader.header == HEADER
    assert list(frames_of(reader)) == [
        (Kind.DATA, 4096, b"blktrack"),
        (Kind.ZERO, 8192, 4096),
        (Kind.DISCARD, 12288, 7712),
        (Kind.DATA, 4096, b"BL"),
    ]
    assert reader.trailer == Trailer(POINT, 2, Counts(4, 10, 4096, 7712, 10))
    reader.expect_end()


def test_the_example_of_the_page() -> None:
    page = (ROOT / "docs/delta-format.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    ([0-9a-f]{8})  ((?:[0-9a-f]{2} ?){1,16})  ", page, re.MULTILINE)
    stream = b"".join(bytes.fromhex(row) for _, row in lines)
    assert [int(at, 16) for at, _ in lines] == list(range(0, len(stream), 16))
    assert stream == written()
    plain = second_reader.parse(stream)
    assert plain.frames == list(frames_of(DeltaReader(io.BytesIO(stream))))
    assert plain.length == len(stream)
    assert f"{second_reader.xxh128(stream[:-16]).hex()}" in page


def test_the_limits_of_the_page() -> None:
    page = (ROOT / "docs/delta-format.md").read_text(encoding="utf-8")
    assert f"`length` ≤ {MAX_FRAME};" in page


def test_a_full_copy_has_no_base() -> None:
    file = io.BytesIO()
    DeltaWriter(file, replace(HEADER, base=None)).end(POINT)
    reader = DeltaReader(io.BytesIO(file.getvalue()))
    assert reader.header.base is None
    assert list(reader) == []
    assert reader.trailer.counts == Counts()


def test_numbers_beyond_32_and_53_bits() -> None:
    size = 2**63 - 1

    def write(writer: DeltaWriter) -> None:
        writer.zero(0, size)
        writer.data(size - 1, b"x")

    stream = written(write, size=size)
    reader = DeltaReader(io.BytesIO(stream))
    assert list(frames_of(reader)) == [(ZERO, 0, size), (DATA, size - 1, b"x")]
    assert second_reader.parse(stream).trailer["counts"]["zero_bytes"] == size


def test_text_that_is_not_ascii() -> None:
    header = replace(HEADER, source=replace(HEADER.source, device="/dev/mapper/größe-磁盘"))
    file = io.BytesIO()
    DeltaWriter(file, header).end(POINT)
    assert DeltaReader(io.BytesIO(file.getvalue())).header == header


SOME = 3 * PAGE
OPERATION = st.one_of(
    st.tuples(st.just(DATA), st.integers(0, SOME - 1), st.binary(min_size=1, max_size=300)),
    st.tuples(
        st.just(DATA),
        st.integers(0, SOME - 1),
        st.builds(lambda b, n: b * n, st.binary(min_size=1, max_size=3), st.integers(1, 3000)),
    ),
    st.tuples(st.sampled_from([ZERO, DISCARD]), st.integers(0, SOME - 1), st.integers(1, SOME)),
)
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


@given(operations=st.lists(OPERATION, max_size=20), level=st.sampled_from([None, 1, 3]))
def test_round_trip(operations: list[Operation], level: int | None) -> None:
    expected = bytearray(b"\xee" * SOME)
    for _, start, content in operations:
        data = bytes(content) if isinstance(content, int) else content
        data = data[: SOME - start]
        expected[start : start + len(data)] = data
    stream = written(perform(operations, SOME), size=SOME, level=level)
    reader = DeltaReader(io.BytesIO(stream))
    plain = second_reader.parse(stream)
    assert list(frames_of(reader)) == plain.frames
    assert image_of(plain, SOME) == expected
    assert reader.trailer.counts.frames == len(operations)
    assert reader.offset == len(stream) == plain.length


@settings(max_examples=25)
@given(operations=st.lists(OPERATION, max_size=20), level=st.sampled_from([None, 1]))
def test_round_trip_through_a_pipe(operations: list[Operation], level: int | None) -> None:
    stream = written(perform(operations, SOME), size=SOME, level=level)
    with through_a_pipe(perform(operations, SOME), SOME, level) as file:
        reader = DeltaReader(file)
        assert list(frames_of(reader)) == second_reader.parse(stream).frames
        reader.expect_end()


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


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
@pytest.mark.parametrize("level", [None, 1], ids=["plain", "zstd"])
def test_large_extents_go_in_frames(level: int | None, blocking: bool, seed: int) -> None:
    rng = random.Random(seed)
    start, length = 12345, 2 * MAX_FRAME + 777
    data = rng.randbytes(MAX_FRAME) + bytes(1000) * ((length - MAX_FRAME) // 1000)
    data += rng.randbytes(length - len(data))
    size = start + length
    pipe = through_a_pipe(lambda writer: writer.data(start, data), size, level, blocking=blocking)
    with pipe as file:
        found = []
        reader = DeltaReader(file)
        for frame in reader:
            assert frame.data is not None
            assert bytes(frame.data) == data[frame.start - start : frame.end - start]
            found.append((frame.start, frame.length))
    assert found == [(start, MAX_FRAME), (start + MAX_FRAME, MAX_FRAME), (size - 777, 777)]
    assert (reader.trailer.counts.stored_bytes < length) == (level is not None)


def test_data_lies_as_direct_io_wants_it() -> None:
    def write(writer: DeltaWriter) -> None:
        for start in (0, 512, PAGE + 7):
            writer.data(start, bytes(100) if start else b"x" * 100)

    for level in (None, 1):
        for frame in DeltaReader(io.BytesIO(written(write, level=level))):
            assert frame.data is not None
            assert address_of(frame.data) % PAGE == frame.start % PAGE


def address_of(view: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def test_frames_that_do_not_shrink_stay_as_they_are(seed: int) -> None:
    noise = random.Random(seed).randbytes(5000)

    def write(writer: DeltaWriter) -> None:
        writer.data(0, noise)
        writer.data(5000, bytes(5000))
        writer.data(10000, b"a")

    stream = written(write, level=3)
    codecs = [raw[1] for raw, _ in deltas.Parts.of(stream).frames]
    assert codecs == [0, 1, 0]


def test_data_may_be_any_buffer() -> None:
    array = bytearray(b"0123456789")
    numbers = memoryview(array).cast("H")
    file = io.BytesIO()
    writer = DeltaWriter(file, HEADER)
    writer.data(0, numbers)
    writer.data(20, array)
    writer.end(POINT)
    numbers.release()
    frames = second_reader.parse(file.getvalue()).frames
    assert frames == [(DATA, 0, bytes(array)), (DATA, 20, bytes(array))]
    array += b"x"  # nobody holds on to it


def test_a_few_bytes_at_a_time() -> None:
    stream = written()
    reader = DeltaReader(Trickle(stream))
    assert list(frames_of(reader)) == second_reader.parse(stream).frames
    sink = Stingy()
    writer = DeltaWriter(sink, HEADER)
    example(writer)
    writer.end(POINT, rounds=2)
    assert sink.data == stream


class Dawdler(io.BytesIO):
    def write(self, data: Any) -> int:
        time.sleep(random.random() / 1000)
        return super().write(data)


@pytest.mark.parametrize(
    ("length", "level"), [(100, 1), (60_000, None)], ids=["small-zstd", "large-plain"]
)
def test_threads_may_write_side_by_side(length: int, level: int | None) -> None:
    pieces, count = max(100_000 // length, 20), 8
    texts = [bytes(range(index, index + 20)) * (length // 20) for index in range(count)]

    def write(writer: DeltaWriter) -> None:
        def run(index: int) -> None:
            for at in range(index, pieces * count, count):
                writer.data(at * length, texts[index])

        threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        size = pieces * count * length
        stream = written(write, size=size, level=level, file=Dawdler())
    finally:
        sys.setswitchinterval(usual)
    assert image_of(second_reader.parse(stream), size) == b"".join(texts) * pieces


def test_small_frames_wait_for_company_but_not_for_ever() -> None:
    file = io.BytesIO()
    writer = DeltaWriter(file, HEADER)
    opened = len(file.getvalue())
    assert DeltaReader(io.BytesIO(file.getvalue())).header == HEADER
    writer.zero(0, 1)
    assert len(file.getvalue()) == opened
    writer.flush()
    assert len(file.getvalue()) == opened + 40 == writer.written


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
