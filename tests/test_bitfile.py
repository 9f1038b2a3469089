"""Sets in files against a model, and what they take of memory."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blktrack import bitfile, bitmap
from blktrack.bitfile import HEAD, BitFile
from blktrack.errors import BlktrackError
from blktrack.linux import PAGE

PAGE_WORDS = PAGE // 8
WORDS = 40 * PAGE_WORDS + 3  # the last page is cut off


@pytest.fixture
def path() -> Iterator[Path]:
    """In memory, as /run is."""
    with tempfile.TemporaryDirectory(prefix="blktrack-test-", dir="/dev/shm") as folder:
        yield Path(folder) / "set"


def taken(path: Path) -> int:
    """Pages."""
    return path.stat().st_blocks * 512 // PAGE


def test_what_is_set_is_found(path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    model = np.zeros(WORDS, dtype=np.uint64)
    with BitFile(path, WORDS, create=True) as made, BitFile(path, WORDS) as other:
        for _ in range(300):
            match random.integers(5):
                case 0:
                    index = np.unique(random.integers(WORDS, size=random.integers(1, 20)))
                    for words in (model, made.reserve(index)):
                        words[index] |= np.uint64(1) << np.uint64(7)
                case 1:
                    first = int(random.integers(WORDS))
                    count = int(random.integers(1, min(3 * PAGE_WORDS, WORDS - first) + 1))
                    index = np.array([0])
                    for words in (model, made.reserve(index, [(first, count)])):
                        words[first : first + count] = bitmap.ALL
                        words[0] |= np.uint64(1)
                case 2:
                    done = np.array([[int(random.integers(WORDS)) * 64, 5000]])
                    bitmap.clear_extents(model, 1, WORDS * 64, done)
                    made.clear_extents(1, WORDS * 64, done)
                case 3 if random.random() < 0.2:
                    first = int(random.integers(WORDS))
                    for words in (model, made.reserve()):
                        words[first] = bitmap.ALL
                case 4 if random.random() < 0.3:
                    model[:] = 0
                    made.clear()
            wanted = np.flatnonzero(model)
            for each in (made, other):
                assert (each.nonzero() == wanted).all()
                assert (each.words == model).all()
            copy = np.zeros(WORDS, dtype=np.uint64)
            assert bitfile.add(path, copy) == bool(len(wanted))
            assert (copy == model).all()


def test_who_asks_where_data_is_need_not_be_told_the_truth(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by tmpfs, of a page that is being moved in memory."""
    index = np.array([5, WORDS - 1])

    def nowhere(fd: int, at: int, whence: int) -> int:
        raise OSError(errno.ENXIO, "all of it is a hole")

    monkeypatch.setattr(os, "lseek", nowhere)
    with BitFile(path, WORDS, create=True) as made:
        made.reserve(index)[index] = bitmap.ALL
        assert made.nonzero().tolist() == index.tolist()
    copy = np.zeros(WORDS, dtype=np.uint64)
    assert bitfile.add(path, copy)
    assert np.flatnonzero(copy).tolist() == index.tolist()


def test_only_what_is_set_takes_memory(path: Path) -> None:
    words = 64 << 17  # of a device of 2 TiB, in granules of 4 KiB: 64 MiB
    index = np.array([3 * PAGE_WORDS, words - 1])
    with BitFile(path, words, create=True) as made:
        assert not len(made.nonzero())
        assert taken(path) <= 1
        made.reserve(index)[index] = 1
        assert made.nonzero().tolist() == index.tolist()
        assert taken(path) == 3
        made.clear()  # keeps the pages of so few
        made.clear()
        assert taken(path) == 1
        assert not len(made.nonzero())


def test_words_are_set_where_they_are_reserved(path: Path) -> None:
    with BitFile(path, WORDS, create=True) as made, pytest.raises(ValueError, match="read-only"):
        made.words[0] = 1


def test_a_set_becomes_longer(path: Path) -> None:
    index = np.array([PAGE_WORDS - 1])
    with BitFile(path, PAGE_WORDS, create=True) as made:
        made.reserve(index)[index] = 1
        BitFile.widen(path, WORDS)
        made.reserve(index)[index] |= np.uint64(2)
    with BitFile(path, WORDS) as longer:
        assert longer.words[index] == 3
        assert longer.nonzero().tolist() == index.tolist()
        copy = np.zeros(PAGE_WORDS // 2, dtype=np.uint64)
        assert not bitfile.add(path, copy)


def test_who_sees_less_of_a_set_takes_no_more_away(path: Path) -> None:
    """As a sync under way, of a device that has grown meanwhile."""
    words = 3 * PAGE_WORDS + 5
    seen = np.array([1, words - 1])
    others = np.array([words, 4 * PAGE_WORDS - 1, 4 * PAGE_WORDS, WORDS - 1])
    with BitFile(path, words, create=True) as made:
        for turn in range(3):
            BitFile.widen(path, WORDS)
            with BitFile(path, WORDS) as longer:
                longer.reserve(others)[others] = bitmap.ALL
            if turn < 2:
                made.reserve(seen)[seen] = 1
                assert made.nonzero().tolist() == seen.tolist()
            made.clear()
            with BitFile(path, WORDS) as longer:
                assert longer.nonzero().tolist() == others.tolist()


def test_one_of_another_form(path: Path) -> None:
    path.write_bytes(bytes(WORDS * 8))
    with pytest.raises(BlktrackError, match="shorter"):
        BitFile(path, WORDS)
    with pytest.raises(FileNotFoundError):
        BitFile(path.with_name("none"), WORDS)
    assert bitfile.add(path.with_name("none"), np.zeros(1, dtype=np.uint64)) is None
    with pytest.raises(ValueError, match="a set of"):
        BitFile(path, HEAD * 8 * PAGE_WORDS + 1)
