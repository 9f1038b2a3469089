"""The delta: the writer against the reader, against a second reader and against its page."""

from __future__ import annotations

import io
import random
import re
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blktrack.linux import PAGE
from blktrack.ship.delta import MAX_FRAME, Counts, DeltaReader, DeltaWriter, Kind, Trailer
from tests import deltas, second_reader
from tests.delta_examples import (
    HEADER,
    POINT,
    ROOT,
    Operation,
    Trickle,
    example,
    frames_of,
    perform,
    through_a_pipe,
    written,
)
from tests.second_reader import DATA, DISCARD, ZERO


def image_of(plain: second_reader.Plain, size: int) -> bytes:
    image = bytearray(b"\xee" * size)
    plain.apply(image)
    return bytes(image)


class Stingy(io.RawIOBase):
    """Takes a few bytes at a time."""

    def __init__(self, most: int = 7) -> None:
        self.data = bytearray()
        self._most = most

    def write(self, data: Any) -> int:
        self.data += memoryview(data)[: self._most]
        return min(len(data), self._most)


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
