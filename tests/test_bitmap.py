"""Every function on bitmaps against sets of numbers."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blktrack import bitmap, extent
from blktrack.bitmap import Words

# Some whole words, some not; two and three words have edges inside and outside.
GRANULES = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 192, 200, 300, 448, 449])
SECTOR = 512


ALL = (1 << 64) - 1
WORD = st.one_of(
    st.sampled_from([0, ALL, 1, 1 << 63]),
    st.integers(1, 63).map(lambda bits: ALL << bits & ALL),
    st.integers(1, 63).map(lambda bits: ALL >> bits),
    st.integers(0, ALL),
)


DEFAULT = bitmap._SCAN, bitmap._SLICE


@pytest.fixture(params=[DEFAULT, (2, 1), (3, 2)], ids=str, scope="module", autouse=True)
def slices(request: pytest.FixtureRequest) -> Iterator[None]:
    """Work goes slice by slice: with small slices every bitmap here has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap, "_SCAN", request.param[0])
        patch.setattr(bitmap, "_SLICE", request.param[1])
        yield


@pytest.fixture
def usual_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmap, "_SCAN", DEFAULT[0])
    monkeypatch.setattr(bitmap, "_SLICE", DEFAULT[1])


def words_of(bits: set[int], granules: int) -> Words:
    words = np.zeros(bitmap.words_for(granules), dtype=np.uint64)
    for bit in bits:
        words[bit // 64] |= np.uint64(1 << bit % 64)
    return words


def bits_of(words: Words) -> set[int]:
    return {
        64 * index + bit
        for index, word in enumerate(words.tolist())
        for bit in range(64)
        if word >> bit & 1
    }


@st.composite
def bit_sets(draw: st.DrawFn, granules: int) -> set[int]:
    """Full, empty and cut words in all orders, as bits."""
    count = bitmap.words_for(granules)
    words = np.array(draw(st.lists(WORD, min_size=count, max_size=count)), dtype=np.uint64)
    return {bit for bit in bits_of(words) if bit < granules}


@st.composite
def ranges(draw: st.DrawFn, granules: int) -> tuple[int, int]:
    """(first, count) within so many granules, often at the edge of a word."""
    edges = [*range(0, granules + 1, 64), granules]
    near = st.builds(lambda e, d: e + d, st.sampled_from(edges), st.integers(-1, 1))
    place = st.one_of(near, st.integers(0, granules)).map(lambda at: min(max(at, 0), granules))
    first, end = sorted((draw(place), draw(place)))
    return first, end - first


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[int, set[int]]:
    granules = draw(GRANULES)
    return granules, draw(bit_sets(granules))


@given(bitmaps(), st.data())
def test_set_range(bitmap_: tuple[int, set[int]], data: st.DataObject) -> None:
    granules, bits = bitmap_
    first, count = data.draw(ranges(granules))
    words = words_of(bits, granules)
    bitmap.set_range(words, first, count)
    assert bits_of(words) == bits | set(range(first, first + count))


@given(bitmaps(), st.data())
def test_clear_range(bitmap_: tuple[int, set[int]], data: st.DataObject) -> None:
    granules, bits = bitmap_
    first, count = data.draw(ranges(granules))
    words = words_of(bits, granules)
    bitmap.clear_range(words, first, count)
    assert bits_of(words) == bits - set(range(first, first + count))


def test_a_range_of_nothing() -> None:
    words = words_of({3, 64}, 128)
    for count in (0, -1):
        bitmap.set_range(words, 5, count)
        bitmap.clear_range(words, 3, count)
    assert bits_of(words) == {3, 64}


@given(bitmaps(), st.data())
def test_set_bits(bitmap_: tuple[int, set[int]], data: st.DataObject) -> None:
    granules, bits = bitmap_
    more = data.draw(st.lists(st.integers(0, granules - 1), max_size=40))
    words = words_of(bits, granules)
    bitmap.set_bits(words, np.array(more, dtype=np.int64))
    assert bits_of(words) == bits | set(more)


@given(bitmaps())
def test_bits_and_count(bitmap_: tuple[int, set[int]]) -> None:
    granules, bits = bitmap_
    words = words_of(bits, granules)
    assert bitmap.bits(words).tolist() == sorted(bits)
    assert bitmap.count(words) == len(bits)
    assert bitmap.count(words, bitmap.nonzero(words)) == len(bits)
    assert bitmap.any_set(words) == bool(bits)
    assert bitmap.nonzero(words).tolist() == sorted({bit // 64 for bit in bits})


@given(GRANULES, st.data())
def test_or_into(granules: int, data: st.DataObject) -> None:
    one, two = data.draw(bit_sets(granules)), data.draw(bit_sets(granules))
    for index in (None, np.array(sorted({bit // 64 for bit in two}), dtype=np.int64)):
        target, source = words_of(one, granules), words_of(two, granules)
        bitmap.or_into(target, source, index)
        assert bits_of(target) == one | two
        assert bits_of(source) == two


@given(bitmaps(), st.sampled_from([512, 4096, 65536]), st.integers(0, 127))
def test_extents(bitmap_: tuple[int, set[int]], granularity: int, missing: int) -> None:
    """The same bytes as the bits, coalesced, none beyond a size that cuts the last granule."""
    granules, bits = bitmap_
    size = granules * granularity - missing % (granularity // SECTOR) * SECTOR
    words = words_of(bits, granules)
    expected = extent.from_pairs(
        [(bit * granularity, min(granularity, size - bit * granularity)) for bit in bits]
    )
    for index in (None, bitmap.nonzero(words)):
        found = bitmap.extents(words, granularity, size, index)
        assert found.dtype == np.int64
        assert found.tolist() == expected.tolist()


@given(bitmaps(), st.integers(0, 70 * 4096))
def test_extents_end_where_the_device_does(bitmap_: tuple[int, set[int]], size: int) -> None:
    """Bits past the end are left out, wholly or in part."""
    granules, bits = bitmap_
    expected = extent.from_pairs(
        [(bit * 4096, min(4096, size - bit * 4096)) for bit in bits if bit * 4096 < size]
    )
    assert bitmap.extents(words_of(bits, granules), 4096, size).tolist() == expected.tolist()


def test_a_full_bitmap_needs_no_memory_of_its_size(usual_slices: None) -> None:
    words = np.full(1 << 22, bitmap.ALL)  # 32 MiB
    index = bitmap.nonzero(words)
    for known in (None, index):
        tracemalloc.start()
        try:
            assert bitmap.count(words, known) == 1 << 28
            assert bitmap.extents(words, 65536, 1 << 44, known).tolist() == [[0, 1 << 44]]
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


@given(bitmaps())
def test_extents_and_back(bitmap_: tuple[int, set[int]]) -> None:
    granules, bits = bitmap_
    words = np.zeros(bitmap.words_for(granules), dtype=np.uint64)
    for start, length in bitmap.extents(words_of(bits, granules), 4096, granules * 4096).tolist():
        bitmap.set_range(words, start // 4096, length // 4096)
    assert bits_of(words) == bits


@given(bitmaps(), st.integers(0, 7), st.data())
def test_clear_extents(bitmap_: tuple[int, set[int]], missing: int, data: st.DataObject) -> None:
    """Granules lose their bits whose bytes are all done, as far as the device goes."""
    granules, bits = bitmap_
    granularity = 4096
    size = granules * granularity - missing * SECTOR
    sectors = data.draw(
        st.lists(
            st.tuples(st.integers(0, size // SECTOR), st.integers(0, 3 * granularity // SECTOR)),
            max_size=6,
        )
    )
    done = extent.from_pairs(
        [(first * SECTOR, min(count * SECTOR, size - first * SECTOR)) for first, count in sectors]
        + [(first * granularity, size - first * granularity) for first in {granules - 1} & bits]
    )
    covered = {
        sector
        for start, length in done.tolist()
        for sector in range(start // SECTOR, (start + length) // SECTOR)
    }
    per = granularity // SECTOR
    whole = {
        granule
        for granule in range(granules)
        if covered.issuperset(range(granule * per, min((granule + 1) * per, size // SECTOR)))
    }
    words = words_of(bits, granules)
    bitmap.clear_extents(words, granularity, size, done)
    assert bits_of(words) == bits - whole


@pytest.mark.parametrize(
    ("start", "length", "left"),
    [
        (0, 65536, {1, 2}),  # a whole granule
        (512, 65536, {0, 1, 2}),  # parts of two
        (512, 2 * 65536, {0, 2}),  # parts of two with a whole one between
        (2 * 65536, 4096, {0, 1}),  # the last granule as far as the device goes
        (2 * 65536, 3584, {0, 1, 2}),  # all but its last sector
        (2 * 65536 + 512, 3584, {0, 1, 2}),  # all but its first
        (0, 2 * 65536 + 4096, set()),
    ],
)
def test_clear_extents_at_the_tail(start: int, length: int, left: set[int]) -> None:
    words = words_of({0, 1, 2}, 3)
    done = extent.from_pairs([(start, length)])
    bitmap.clear_extents(words, 65536, 2 * 65536 + 4096, done)
    assert bits_of(words) == left


def test_clearing_the_own_extents_leaves_nothing() -> None:
    words = words_of(set(range(100, 300)) | {0, 448}, 449)
    size = 449 * 4096 - 512
    bitmap.clear_extents(words, 4096, size, bitmap.extents(words, 4096, size))
    assert not bitmap.any_set(words)


def test_offsets_beyond_32_bits(usual_slices: None) -> None:
    """16 TiB in granules of 64 KiB."""
    granules = 1 << 28
    words = np.zeros(granules // 64, dtype=np.uint64)
    edge = 64 * bitmap._SCAN  # where the first slice ends
    bitmap.set_range(words, edge - 1, 2)
    bitmap.set_range(words, granules - 1, 1)
    bitmap.set_bits(words, np.array([0]))
    assert bitmap.extents(words, 65536, 1 << 44).tolist() == [
        [0, 65536],
        [(edge - 1) * 65536, 2 * 65536],
        [(1 << 44) - 65536, 65536],
    ]
    assert bitmap.count(words) == 4


def test_sizes() -> None:
    assert [bitmap.words_for(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert [bitmap.granules_for(n, 4096) for n in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
    nothing = np.zeros(0, dtype=np.uint64)
    assert not bitmap.any_set(nothing)
    assert bitmap.count(nothing) == 0
    assert bitmap.bits(nothing).tolist() == []
    assert bitmap.extents(nothing, 4096, 0).tolist() == []
