"""Packs: what is written in any order, by several threads, is read back by its last writer."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from blktrack import extent
from blktrack.linux import PAGE, Buffer
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import EndError, FileEnd
from blktrack.ship.overridden import unused_in
from blktrack.ship.pack import ZERO, Index, Packer, Unpacker, fault, resolve
from blktrack.units import KIB, MIB
from tests.copies import image, random_extents

SIZE = 16 * MIB


def painted(rows: Index, size: int) -> tuple[np.ndarray, np.ndarray]:
    """By bytes of 512: which place each has, and whether it is covered at all."""
    place, covered = np.full(size, ZERO, dtype=np.int64), np.zeros(size, dtype=bool)
    for start, length, at in rows.tolist():
        covered[start : start + length] = True
        place[start : start + length] = ZERO if at == ZERO else at + np.arange(length)
    return place, covered


def test_later_rows_override_earlier_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        size, count = 200, int(rng.integers(0, 20))
        start = rng.integers(0, size - 1, count)
        length = np.minimum(rng.integers(1, 60, count), size - start)
        place = np.where(rng.random(count) < 0.3, ZERO, rng.integers(0, 1000, count))
        rows = np.stack([start, length, place], axis=1).astype(np.int64)
        found = resolve(rows)
        assert (found[1:, 0] >= found[:-1, 0] + found[:-1, 1]).all() and (found[:, 1] > 0).all()
        for one, other in zip(painted(rows, size), painted(found, size), strict=True):
            assert (one == other).all(), rows


def test_pages_that_nobody_needs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        pages = int(rng.integers(1, 30))
        used = rng.random(pages) < 0.6
        rows = [
            (page * 5 * PAGE + 512, 2048, page * PAGE + 512)
            for page in np.flatnonzero(used).tolist()
        ]
        rows += [((page * 5 + 2) * PAGE, 512, ZERO) for page in range(pages)]
        index = resolve(np.array(rows, dtype=np.int64))
        found = np.zeros(pages, dtype=bool)
        for start, length in unused_in(index, pages * PAGE).tolist():
            assert not (start | length) % PAGE
            found[start // PAGE : (start + length) // PAGE] = True
        assert (found == ~used).all()


@pytest.mark.parametrize("unit", [512, 4096])
def test_rounds_are_read_back(tmp_path: Path, seed: int, unit: int) -> None:
    rng = np.random.default_rng(seed)
    expected, every = np.zeros(SIZE, dtype=np.uint8), extent.empty()
    pack = tmp_path / "pack"
    pack.touch()
    packer = Packer(FileEnd(str(pack), writable=True), SIZE)
    for number in range(4):
        extents = random_extents(rng, SIZE, unit)
        source = tmp_path / f"source{number}"
        source.write_bytes(image(rng, SIZE, 0.3))
        with FileEnd(str(source)) as end:
            copied = copy(end, packer, extents, chunk=256 * KIB if number % 2 else 4 * MIB)
        assert not len(copied.failed)
        data = np.fromfile(source, dtype=np.uint8)
        for start, length in extents.tolist():
            expected[start : start + length] = data[start : start + length]
        every = extent.union(every, extents)
    index, packed = resolve(packer.index()), packer.finish()
    packer.close()
    assert pack.stat().st_size == packed
    assert not fault(index, SIZE, packed)
    assert (extent.union(extent.empty(), index[:, :2]) == every).all()
    replica = tmp_path / "replica"
    replica.write_bytes(bytes(SIZE))
    with FileEnd(str(pack)) as file, FileEnd(str(replica), writable=True) as end:
        copied = copy(Unpacker(file, index, SIZE), end, index[:, :2])
    assert not len(copied.failed)
    assert (np.fromfile(replica, dtype=np.uint8) == expected).all()


def test_small_writes_of_many_threads(tmp_path: Path, seed: int) -> None:
    pack = tmp_path / "pack"
    pack.touch()
    packer = Packer(FileEnd(str(pack), writable=True), SIZE)
    order = np.random.default_rng(seed).permutation(SIZE // (8 * KIB))

    def write(part: list[int]) -> None:
        for block in part:
            data = Buffer(PAGE).view
            data[:] = block.to_bytes(4, "little") * (PAGE // 4)
            packer.write(data, block * 8 * KIB)
            packer.zero(block * 8 * KIB + PAGE, PAGE)

    threads = [threading.Thread(target=write, args=(order[i::4].tolist(),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index, packed = resolve(packer.index()), packer.finish()
    packer.close()
    assert packed == SIZE // 2
    with FileEnd(str(pack)) as file:
        end = Unpacker(file, index, SIZE)
        for block in range(SIZE // (8 * KIB)):
            assert end.read(block * 8 * KIB, PAGE) == block.to_bytes(4, "little") * (PAGE // 4)
            assert end.read(block * 8 * KIB + PAGE, PAGE) == bytes(PAGE)


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.touch()
    packer = Packer(FileEnd(str(pack), writable=True), SIZE)
    packer.write(Buffer(PAGE).view, 3 * PAGE)
    with pytest.raises(EndError):
        packer.read(3 * PAGE, PAGE)
    packer.finish()
    packer.close()
    with FileEnd(str(pack)) as file:
        end = Unpacker(file, resolve(packer.index()), SIZE)
        assert end.read(3 * PAGE, PAGE) == bytes(PAGE)
        for start, length in ((0, PAGE), (2 * PAGE, 2 * PAGE), (3 * PAGE, 2 * PAGE)):
            with pytest.raises(ValueError, match="not within"):
                end.read(start, length)
        with pytest.raises(EndError):
            end.write(Buffer(PAGE).view, 3 * PAGE)
