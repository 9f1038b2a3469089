"""Extents against sets of bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blktrack import extent
from blktrack.extent import Extent, ExtentArray

PAIRS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=30)


def bytes_of(pairs: list[tuple[int, int]]) -> set[int]:
    return {byte for start, length in pairs for byte in range(start, start + length)}


def check_canonical(extents: ExtentArray) -> None:
    """Sorted, disjoint, not touching, none empty, of the one type."""
    assert extents.dtype == np.int64
    assert extents.ndim == 2
    assert extents.shape[1] == 2
    assert (extents[:, 1] > 0).all()
    assert (extents[1:, 0] > extents[:-1].sum(axis=1)).all()


@given(PAIRS)
def test_from_pairs_is_the_same_bytes_in_canonical_form(pairs: list[tuple[int, int]]) -> None:
    extents = extent.from_pairs(pairs)
    check_canonical(extents)
    assert bytes_of([(start, length) for start, length in extents.tolist()]) == bytes_of(pairs)
    assert extent.total(extents) == len(bytes_of(pairs))


@given(PAIRS, st.randoms(use_true_random=False))
def test_from_pairs_does_not_mind_the_order(pairs: list[tuple[int, int]], random: object) -> None:
    mixed = list(pairs)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert np.array_equal(extent.from_pairs(mixed), extent.from_pairs(pairs))


@given(PAIRS)
def test_canonical_extents_stay_as_they_are(pairs: list[tuple[int, int]]) -> None:
    once = extent.from_pairs(pairs)
    again = extent.from_pairs([(e.start, e.length) for e in extent.to_list(once)])
    assert np.array_equal(once, again)


def test_offsets_beyond_32_and_53_bits() -> None:
    far = 2**62
    extents = extent.from_pairs([(far + 4096, 4096), (far, 4096)])
    assert extent.to_list(extents) == [Extent(far, 8192)]


def test_empty() -> None:
    for extents in (extent.empty(), extent.from_pairs([]), extent.from_pairs([(5, 0), (7, -1)])):
        check_canonical(extents)
        assert len(extents) == 0
        assert extent.total(extents) == 0
        assert extent.to_list(extents) == []


def test_extent_of_python_numbers() -> None:
    found = extent.to_list(extent.from_pairs([(512, 1024)]))[0]
    assert (found.start, found.length, found.end, str(found)) == (512, 1024, 1536, "512+1024")
    assert type(found.start) is int  # numpy's would not go into JSON


@given(PAIRS, PAIRS)
def test_union_and_intersection_are_those_of_the_bytes(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    first, second = extent.from_pairs(one), extent.from_pairs(other)
    assert extent.intersect(first, second) == bool(bytes_of(one) & bytes_of(other))
    both = extent.union(first, second)
    check_canonical(both)
    assert both.tolist() == extent.from_pairs([*one, *other]).tolist()
