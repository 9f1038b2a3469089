"""The copy engine against plain bytes, on real devices and file systems."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blktrack import extent
from blktrack.extent import ExtentArray, from_pairs
from blktrack.ship import worker
from blktrack.ship.copy import Mode, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.plan import MAX_REQUESTS
from blktrack.units import KIB, MIB, SECTOR
from tests.copies import content, fill, image, patched, random_extents, sparse, whole
from tests.loopdev import Disks

PRIME = 4099  # sectors: about 2 MiB, whose end lies in no block larger than a sector


def lists(extents: ExtentArray) -> list[list[int]]:
    return [[int(start), int(length)] for start, length in extents]


def differences(
    old: bytes | bytearray, new: bytes | bytearray, extents: ExtentArray, unit: int
) -> list[list[int]]:
    """The parts of aligned units, within the extents, that differ."""
    pairs = []
    for start, length in extents.tolist():
        end = start + length
        while start < end:
            stop = min(end, (start // unit + 1) * unit)
            if old[start:stop] != new[start:stop]:
                pairs.append((start, stop - start))
            start = stop
    return lists(from_pairs(pairs))


MakeReplica = Callable[[Disks, int], Path]


def on_ext4(sector: int) -> MakeReplica:
    def make(disks: Disks, size: int) -> Path:
        point = disks.mount(disks.loop(64 * MIB, sector=sector), "ext4")
        return sparse(point / "replica", size)

    return make


def on_xfs(disks: Disks, size: int) -> Path:
    return sparse(disks.mount(disks.loop(512 * MIB), "xfs") / "replica", size)


def on_tmpfs(disks: Disks, size: int) -> Path:
    return sparse(disks.name("replica"), size)


def on_device(sector: int) -> MakeReplica:
    return lambda disks, size: disks.loop(-(-size // sector) * sector, sector=sector)


PLACES = [
    pytest.param(512, on_device(512), id="512-to-512"),
    pytest.param(4096, on_device(4096), id="4k-to-4k"),
    pytest.param(4096, on_device(512), id="4k-to-512"),
    pytest.param(512, on_tmpfs, id="512-to-tmpfs"),
    pytest.param(512, on_ext4(512), id="512-to-ext4", marks=pytest.mark.needs("ext4")),
    pytest.param(512, on_ext4(4096), id="512-to-ext4-of-4k", marks=pytest.mark.needs("ext4")),
    pytest.param(512, on_xfs, id="512-to-xfs", marks=pytest.mark.needs("xfs")),
]


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize(("sector", "make"), PLACES)
def test_any_copy_is_what_bytes_would_be(
    disks: Disks, sector: int, make: MakeReplica, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = PRIME * SECTOR // sector * sector
    source_path = disks.loop(size, sector=sector)
    replica_path = make(disks, size)
    new, old = image(rng, size), image(rng, size)
    fill(replica_path, old)
    expected = bytes(old)
    for _ in range(12):
        mode = Mode(rng.choice([mode.value for mode in Mode]))
        extents = random_extents(rng, size, sector)
        # Mostly alike, as for a resync, else all different.
        new = image(rng, size) if rng.random() < 0.5 else bytearray(expected)
        for _ in range(3):
            new[int(rng.integers(size))] ^= 1
        fill(source_path, new)
        unit = int(rng.choice([4096, 64 * KIB]))
        with (
            open_end(str(source_path)) as source,
            open_end(str(replica_path), writable=True) as replica,
        ):
            done: list[list[int]] = []
            copied = copy(
                source,
                replica,
                extents,
                mode=mode,
                granularity=unit,
                checkpoint=lambda settled, done=done: done.extend(settled.tolist()),  # type: ignore[misc]
                threads=int(rng.integers(1, 6)),
                chunk=int(rng.choice([64 * KIB, 256 * KIB, 4 * MIB])),
            )
        differing = differences(expected, new, extents, unit)
        if mode is not Mode.COMPARE:
            expected = patched(expected, new, extents)
            assert sorted(done) == extents.tolist()
        else:
            assert done == []
        assert copied.bytes_read == extent.total(extents)
        assert not copied.interrupted
        assert copied.failed.tolist() == []
        assert copied.different.tolist() == ([] if mode is Mode.COPY else differing)
        moved = {
            Mode.COPY: extent.total(extents),
            Mode.REPAIR: sum(length for _, length in differing),
            Mode.COMPARE: 0,
        }[mode]
        assert copied.bytes_written + copied.bytes_zeroed == moved
        assert content(replica_path)[:size] == expected


@pytest.mark.needs("root", "loop")
def test_many_small_extents(disks: Disks, seed: int) -> None:
    size = 32 * MIB
    rng = np.random.default_rng(seed)
    data = rng.integers(1, 256, size, dtype=np.uint8).tobytes()
    source, replica = disks.loop(size), disks.loop(size)
    fill(source, data)
    extents = from_pairs([(start, 4096) for start in range(0, size, 8192)])
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copied = copy(one, other, extents)
    assert copied.requests == len(extents) == 4096
    assert copied.bytes_written == 16 * MIB
    assert content(replica) == patched(bytes(size), data, extents)


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize("lacking", ["requests", "direct", "both"])
def test_without_what_a_kernel_may_lack(
    disks: Disks, lacking: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def refuse(depth: int) -> None:
        raise OSError(errno.ENOSYS, "no AIO")

    monkeypatch.setattr(worker, "_idle", [])
    if lacking != "direct":
        monkeypatch.setattr(worker, "RequestQueue", refuse)
    if lacking != "requests":
        monkeypatch.setattr("blktrack.ship.endpoint._open_direct", lambda fd, mode: (-1, 1))
    rng = np.random.default_rng(seed)
    size = PRIME * SECTOR
    data = image(rng, size)
    source = disks.loop(size)
    replica = sparse(disks.name("replica"), size)
    fill(source, data)
    extents = random_extents(rng, size)
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copy(one, other, extents)
    assert replica.read_bytes() == patched(bytes(size), data, extents)


@pytest.mark.needs("root", "loop", "ext4")
def test_zeroes_become_holes(disks: Disks) -> None:
    size = 8 * MIB
    source = disks.loop(size)
    with source.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"data" * 16 * KIB)
    point = disks.mount(disks.loop(64 * MIB), "ext4")
    for name, known_zero in [("fresh", True), ("sparse", False), ("full", False)]:
        replica = sparse(point / name, size)
        if name == "full":
            fill(replica, b"\xff" * size)
        with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
            copied = copy(one, other, whole(size), known_zero=known_zero)
        assert (copied.bytes_written, copied.bytes_zeroed) == (64 * KIB, size - 64 * KIB)
        assert replica.read_bytes() == source.read_bytes()
        assert replica.stat().st_blocks * 512 <= 72 * KIB, name
    # Nothing is put where it was promised that zeroes are: the price of a wrong promise.
    fill(replica, b"\xff" * size)
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copy(one, other, whole(size), known_zero=True)
    assert replica.read_bytes()[:MIB] == b"\xff" * MIB


@pytest.mark.needs("root", "loop")
def test_zeroes_free_the_space_of_a_device(disks: Disks) -> None:
    source, file = disks.loop(4 * MIB), disks.name("replica")
    file.write_bytes(b"\xff" * 4 * MIB)
    replica = disks.loop(file=file)
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copied = copy(one, other, whole(4 * MIB))
    assert copied.bytes_written == 0
    assert content(replica) == bytes(4 * MIB)
    assert file.stat().st_blocks == 0


@pytest.mark.needs("root", "loop")
def test_a_repair_of_more_granules_than_go_at_once(disks: Disks) -> None:
    """A few large reads, and every other granule of them differs."""
    size = 4 * MIB
    data = np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8)
    other = data.copy()
    other.reshape(-1, 4 * KIB)[::2] ^= 1
    paths = [disks.loop(size), disks.loop(size)]
    for path, bytes_ in zip(paths, (data, other), strict=True):
        fill(path, bytes_.tobytes())
    with open_end(str(paths[0])) as source, open_end(str(paths[1]), writable=True) as replica:
        done = copy(
            source,
            replica,
            whole(size),
            mode=Mode.REPAIR,
            granularity=4 * KIB,
            threads=1,
            chunk=size,
        )
    assert len(done.different) == size // (8 * KIB) > MAX_REQUESTS
    assert done.bytes_written == size // 2
    assert content(paths[1]) == data.tobytes()
