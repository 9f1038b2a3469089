"""Comparing by digests finds what comparing bytes finds, and takes nothing else for an answer."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blktrack import extent
from blktrack.linux import PAGE, Buffer
from blktrack.ship.endpoint import FileEnd
from blktrack.ship.plan import Piece
from blktrack.ship.wire import digests
from blktrack.ship.wire.digests import SIZE, UNIT

KEY = bytes(range(32))
END = 20 * UNIT  # bytes that are compared
IMAGE = random.Random(0).randbytes(END)
GRANULARITIES = [512, 4096, 8192, UNIT, 2 * UNIT, 1 << 20]


@st.composite
def extents(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Disjoint ones in order, some of them next to each other, aligned or not."""
    unit = draw(st.sampled_from([1, 512, 4096]))
    rows, at = [], 0
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.sampled_from([0, 0, 1, 7, 130])) * unit
        length = draw(st.sampled_from([1, 3, 8, 17, 128, 200])) * unit
        if at + length > END:
            break
        rows.append((at, length))
        at += length
    return rows or [(0, unit)]


def filled(pieces: list[Piece], image: bytes) -> Buffer:
    buffer = Buffer(max(PAGE, digests.room(pieces)))
    for start, length, at in pieces:
        buffer.view[at : at + length] = image[start : start + length]
    return buffer


def differences(
    rows: list[tuple[int, int]], ours: bytes, theirs: bytes, granularity: int
) -> list[Piece]:
    """As it goes over the wire: both have their own places for the same extents."""
    shift = digests.layout([(0, 1), *rows])[1:]  # not where the keeper has them
    here = filled(shift, ours)
    said = digests.describe(shift, here, KEY)
    there = digests.layout(rows)
    answer = b"".join(digests.answer(there, said, filled(there, theirs), KEY, granularity))
    found = digests.different(shift, answer, here, KEY, granularity)
    for start, length, at in found:
        assert here.view[at : at + length] == ours[start : start + length], "where it says"
    return found


def covered(found: list[Piece]) -> list[tuple[int, int]]:
    pairs = [(start, length) for start, length, _ in found]
    return [tuple(row) for row in extent.union(extent.empty(), extent.from_pairs(pairs)).tolist()]


@given(extents(), st.sampled_from(GRANULARITIES), st.integers(0, 2**32))
def test_the_same_as_of_an_end_on_this_host(
    rows: list[tuple[int, int]], granularity: int, chosen: int
) -> None:
    rng, ours = random.Random(chosen), IMAGE
    other = bytearray(ours)
    for start, length in rows if rng.random() < 0.3 else ():
        other[start : start + length] = rng.randbytes(length)
    for _ in range(rng.randrange(6)):
        start, length = rng.choice(rows)
        place = start + rng.randrange(length)
        size = rng.choice([1, 1, 100, 5000, UNIT])
        other[place : place + size] = rng.randbytes(min(size, END - place))
    theirs = bytes(other)
    found = differences(rows, ours, theirs, granularity)
    # Byte by byte, then to granules: what is different, and nothing else of any granule.
    size = min(granularity, UNIT)
    expected = []
    for start, length in rows:
        for begin in range(start - start % size, start + length, size):
            low, high = max(begin, start), min(begin + size, start + length)
            if ours[low:high] != theirs[low:high]:
                expected.append((low, high - low))
    assert covered(found) == covered([Piece(*pair, 0) for pair in expected])
    local = of_an_end(rows, ours, theirs, granularity)
    if granularity <= UNIT:
        assert covered(found) == covered(local)
    else:  # asked for in units of 64 KiB at most: never more
        assert within(of(found), of(local))


def of(found: list[Piece]) -> extent.ExtentArray:
    return extent.union(extent.empty(), extent.from_pairs([(a, b) for a, b, _ in found]))


def within(some: extent.ExtentArray, all_: extent.ExtentArray) -> bool:
    return extent.total(extent.union(some, all_)) == extent.total(all_)


def of_an_end(
    rows: list[tuple[int, int]], ours: bytes, theirs: bytes, granularity: int
) -> list[Piece]:
    path = Path("/dev/shm") / f"blktrack-digests-{random.SystemRandom().getrandbits(64):x}"
    path.write_bytes(theirs)
    try:
        with FileEnd(str(path)) as end:
            pieces = digests.layout(rows)
            room = Buffer(max(PAGE, digests.room(pieces)))
            return end.differences(pieces, filled(pieces, ours), room, None, granularity)
    finally:
        path.unlink()


def test_what_is_the_same_costs_a_digest_of_each_unit() -> None:
    image = IMAGE
    pieces = digests.layout([(0, END)])
    buffer = filled(pieces, image)
    said = digests.describe(pieces, buffer, KEY)
    assert len(said) == 20 * SIZE
    assert digests.answer(pieces, said, buffer, KEY, 4096) == []
    other = filled(pieces, image[:-1] + bytes([image[-1] ^ 1]))
    found = b"".join(digests.answer(pieces, said, other, KEY, 4096))
    assert len(found) == 4 + UNIT // 4096 * SIZE and found[:4] == struct.pack("<I", 19)
    assert differences([(0, END)], image, bytes(other.view), 4096)[0][:2] == (END - 4096, 4096)


def test_another_key_another_digest() -> None:
    pieces = digests.layout([(0, UNIT)])
    buffer = filled(pieces, bytes(UNIT))
    said = digests.describe(pieces, buffer, KEY)
    assert said != digests.describe(pieces, buffer, bytes(32))
    # Of a unit that is cut off at the end it is another one too.
    assert said != digests.describe(digests.layout([(0, UNIT - 1)]), buffer, KEY)


@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(1, 10**6)), max_size=30))
def test_extents_lie_as_in_their_pages(rows: list[tuple[int, int]]) -> None:
    pieces = digests.layout(rows)
    used = 0
    for (start, length), piece in zip(rows, pieces, strict=True):
        assert piece[:2] == (start, length)
        assert piece.at % PAGE == start % PAGE and piece.at // PAGE * PAGE >= used
        used = -(-(piece.at + length) // PAGE) * PAGE
    assert used <= sum(length for _, length in rows) + 2 * len(rows) * PAGE
    assert (digests.room(pieces) <= used) if rows else (digests.room(pieces) == 0)


@given(extents())
def test_units_are_the_pieces(rows: list[tuple[int, int]]) -> None:
    pieces = digests.layout(rows)
    found = list(digests.units(pieces))
    assert all(unit.start // UNIT == (unit.start + unit.length - 1) // UNIT for unit in found)
    for piece in pieces:
        own = [unit for unit in found if piece.start <= unit.start < piece.start + piece.length]
        assert sum(unit.length for unit in own) == piece.length
        assert all(unit.at - unit.start == piece.at - piece.start for unit in own)


PIECES = digests.layout([(0, UNIT), (3 * UNIT, 6000)])


@pytest.mark.parametrize(
    ("answered", "why"),
    [
        (b"\2\0\0\0" + bytes(16 * SIZE), "a unit that was not asked for"),
        (b"\xff\xff\xff\xff", "a unit that was not asked for"),
        (b"\0", "too few digests"),
        (b"\0\0\0\0", "too few digests"),
        (b"\0\0\0\0" + bytes(16 * SIZE - 1), "too few digests"),
        (b"\0\0\0\0" + bytes(15 * SIZE), "too few digests"),
        (b"\0\0\0\0" + bytes(16 * SIZE) + b"\1\0\0\0" + bytes(SIZE), "too few digests"),
        ((b"\0\0\0\0" + bytes(16 * SIZE)) * 2, "a unit that was not asked for"),
        (
            b"\1\0\0\0" + bytes(2 * SIZE) + b"\0\0\0\0" + bytes(16 * SIZE),
            "a unit that was not asked for",
        ),
    ],
)
def test_answers_that_are_none(answered: bytes, why: str) -> None:
    buffer = Buffer(digests.room(PIECES))
    with pytest.raises(ValueError, match=why):
        digests.different(PIECES, answered, buffer, KEY, 4096)


@given(st.binary(max_size=700), st.sampled_from(GRANULARITIES))
def test_whatever_is_answered(answered: bytes, granularity: int) -> None:
    """No place is found that was not asked for, and none twice."""
    buffer = Buffer(digests.room(PIECES))
    for said in (answered, b"\0\0\0\0" + answered, b"\1\0\0\0" + answered):
        try:
            found = digests.different(PIECES, said, buffer, KEY, granularity)
        except ValueError:
            continue
        asked = extent.from_pairs([(start, length) for start, length, _ in PIECES])
        assert within(of(found), asked)
        assert sum(length for _, length, _ in found) == extent.total(of(found))


@pytest.mark.parametrize("count", [0, 1, 2 * SIZE, 3 * SIZE + 1, 4 * SIZE])
def test_questions_that_are_none(count: int) -> None:
    rows = [(0, UNIT), (3 * UNIT - 1, 2)]  # three units
    pieces = digests.layout(rows)
    with pytest.raises(ValueError, match="as many digests as units"):
        digests.answer(pieces, bytes(count), Buffer(digests.room(pieces)), KEY, 4096)


def test_the_same_extents() -> None:
    one = extent.from_pairs([(0, 4096), (8192, 512)])
    assert digests.of_extents(one) == digests.of_extents(one.copy())
    assert digests.of_extents(one) == digests.of_extents(one[::1])
    others = [extent.empty(), one[:1], one[::-1], extent.from_pairs([(0, 4096), (8192, 513)])]
    found = {digests.of_extents(other) for other in [one, *others]}
    assert len(found) == 5 and all(len(text) == 40 for text in found)
