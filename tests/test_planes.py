"""Dirty maps: what the programs mark by radix-64 levels reads back as exactly the ranges meant."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from blktrack import bitmap
from blktrack.bitmap import Words
from blktrack.bpf import abi
from blktrack.bpf.planes import Geometry, Planes

PLANES = (abi.SUBMITTED, abi.COMPLETED)
SIZES = [1, 63, 64, 65, 4095, 4096, 4097, 3 * 64**2 + 5, 64**3, 64**3 + 64**2 + 77, 2 * 64**3 + 1]
LONGEST = (4 << 30) // 512  # granules of the longest bio at the finest granularity
MASK = (1 << 64) - 1


@contextmanager
def planes_of(granules: int) -> Iterator[Planes]:
    """Planes in plain memory."""
    geometry = Geometry(granules)
    fd = os.memfd_create("planes")
    try:
        os.ftruncate(fd, 2 * geometry.plane_words * 8)
        planes = Planes(fd, geometry)
        yield planes
        planes.close()
    finally:
        os.close(fd)


def mark(planes: Planes, number: int, first: int, last: int) -> int:
    """mark_granules of track.h, line by line. How many words it sets."""
    plane = planes.plane(number)
    touched = 0

    def set_bits(word: int, bits: int) -> None:
        nonlocal touched
        plane[word] |= np.uint64(bits)
        touched += 1

    for level in range(abi.LEVELS):
        words = planes.geometry.offsets[level]
        low, high = first >> 6, last >> 6
        head, tail = MASK << (first & 63) & MASK, MASK >> (63 - (last & 63))
        if low == high:
            set_bits(words + low, head & tail)
            return touched
        if level == abi.LEVELS - 1:
            assert high == low + 1
            set_bits(words + low, head)
            set_bits(words + high, tail)
            return touched
        if first & 63:
            set_bits(words + low, head)
            low += 1
        if ~last & 63:
            set_bits(words + high, tail)
            high -= 1
        if low > high:
            return touched
        first, last = low, high
    raise AssertionError("unreachable")


def merged(planes: Planes, number: int) -> Words:
    target = np.zeros(bitmap.words_for(planes.geometry.granules), dtype=np.uint64)
    planes.merge_into(number, target)
    return target


def words_of(granules: int, ranges: list[tuple[int, int]]) -> Words:
    """The bits of inclusive ranges, by another road: one byte each, then packed."""
    flags: NDArray[np.uint8] = np.zeros(bitmap.words_for(granules) * 64, dtype=np.uint8)
    for first, last in ranges:
        flags[first : last + 1] = 1
    return np.packbits(flags, bitorder="little").view(np.uint64)


@st.composite
def marks(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A number of granules and (first, last) ranges of them, often at an edge of some level."""
    granules = draw(st.sampled_from(SIZES))
    unit = st.sampled_from([1, 64, 64**2, 64**3])
    edge = st.builds(lambda u, n, d: u * n + d, unit, st.integers(0, 70), st.integers(-1, 1))
    place = st.one_of(edge, st.sampled_from([0, granules - 1]), st.integers(0, granules - 1))
    inside = place.map(lambda at: min(max(at, 0), granules - 1))
    pairs = draw(st.lists(st.tuples(inside, inside), min_size=1, max_size=4))
    return granules, [(min(pair), max(pair)) for pair in pairs]


@given(marks())
@example((64**3 + 64**2 + 77, [(0, 64**3 + 64**2 + 76)]))
@example((64**3, [(0, 64**3 - 1)]))
@example((2 * 64**3 + 1, [(1, 2 * 64**3 - 1)]))
def test_merge_is_exactly_what_was_marked(marks: tuple[int, list[tuple[int, int]]]) -> None:
    granules, ranges = marks
    with planes_of(granules) as planes:
        for first, last in ranges:
            assert mark(planes, abi.COMPLETED, first, last) <= 2 * abi.LEVELS
        expected = words_of(granules, ranges)
        assert np.array_equal(merged(planes, abi.COMPLETED), expected)
        assert not merged(planes, abi.SUBMITTED).any()
        assert planes.any_set(abi.COMPLETED)
        assert not planes.any_set(abi.SUBMITTED)


@given(marks(), marks())
def test_merge_adds_to_what_is_there(
    one: tuple[int, list[tuple[int, int]]], two: tuple[int, list[tuple[int, int]]]
) -> None:
    granules, ranges = one
    before = [(first, last) for first, last in two[1] if last < granules]
    with planes_of(granules) as planes:
        for first, last in ranges:
            mark(planes, abi.SUBMITTED, first, last)
        target = words_of(granules, before)
        found = planes.nonzero()
        planes.merge_into(abi.SUBMITTED, target, found[abi.SUBMITTED])
        assert np.array_equal(target, words_of(granules, ranges + before))


@given(marks(), marks())
def test_planes_do_not_meet_and_clear_empties_both(
    one: tuple[int, list[tuple[int, int]]], two: tuple[int, list[tuple[int, int]]]
) -> None:
    granules = max(one[0], two[0])
    with planes_of(granules) as planes:
        for plane, (_, ranges) in zip(PLANES, (one, two), strict=True):
            for first, last in ranges:
                mark(planes, plane, first, last)
        for plane, (_, ranges) in zip(PLANES, (one, two), strict=True):
            assert np.array_equal(merged(planes, plane), words_of(granules, ranges))
        planes.clear(planes.nonzero())
        for plane in PLANES:
            assert not planes.plane(plane).any()
            assert not merged(planes, plane).any()


def test_clear_leaves_words_that_were_not_found() -> None:
    """Marks that came after the look are kept; the caller knows when none can come."""
    with planes_of(1000) as planes:
        mark(planes, abi.COMPLETED, 0, 0)
        found = planes.nonzero()
        mark(planes, abi.COMPLETED, 640, 640)
        planes.clear(found)
        assert np.array_equal(merged(planes, abi.COMPLETED), words_of(1000, [(640, 640)]))


@pytest.mark.parametrize("first", [0, 1, 63, 64, 64**3 - 1, 64**3])
def test_the_longest_bio_at_the_finest_granularity(first: int) -> None:
    granules = LONGEST + 64**3 + 64
    with planes_of(granules) as planes:
        last = first + LONGEST - 1
        assert mark(planes, abi.COMPLETED, first, last) <= 2 * abi.LEVELS
        assert np.array_equal(merged(planes, abi.COMPLETED), words_of(granules, [(first, last)]))


@given(st.integers(1, 1 << 28))
@example(1)
@example(1 << 28)
def test_geometry(granules: int) -> None:
    geometry = Geometry(granules)
    assert len(geometry.levels) == len(geometry.offsets) == abi.LEVELS
    need = granules
    at = 0
    for words, offset in zip(geometry.levels, geometry.offsets, strict=True):
        assert words * 64 >= need > (words - 1) * 64  # room for all bits, none too many
        assert offset == at
        at += words
        need = words
    assert geometry.plane_words >= at
    assert geometry.plane_words * 8 % mmap.PAGESIZE == 0
    # Two bits for each granule, and a sixty-third more for the upper levels.
    assert geometry.map_bytes <= 2 * granules / 8 * (1 + 1 / 63) + 5 * mmap.PAGESIZE
