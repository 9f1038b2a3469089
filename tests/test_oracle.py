"""Nothing that changed is missed: the tracked extents against every byte that differs.

An image of the device is taken before and after a random mix of changes. Each sector that differs
must lie in a tracked extent; a replica that was synced while the mix went on must be the device in
the end. The last tests break the tracking on purpose and see the same checks find it.
"""

from __future__ import annotations

import os
import random
import shutil

import numpy as np
import pytest

from blktrack import linux
from blktrack.bitmap import Indices
from blktrack.bpf import compile
from blktrack.bpf.kernel import Kernel
from blktrack.bpf.planes import Planes
from blktrack.extent import empty
from blktrack.sysfs import BlockDevice
from blktrack.tracker.link import LinkSets
from blktrack.units import KIB, MIB, SECTOR
from tests import sectors
from tests.blockdev import Lab, read_image, write_direct
from tests.fixtures import every_kind
from tests.oracle import cover, fill, missed, replicate

needs_devices = pytest.mark.needs("root", "loop", "bpf", "fio", "ext4", "xfs")


def make(lab: Lab, kind: str) -> tuple[list[str], str]:
    """The paths of a device (see Lab.device) and the file system that it is to get."""
    if kind == "loop-4096":
        return lab.device(kind, 304 * MIB), "xfs"  # which takes no less
    return lab.device(kind, 64 * MIB), "ext4"


def replica_of(lab: Lab, kind: str, device: str, replica: str) -> str:
    """The path of a file that is yet to be, or of a device."""
    if replica == "file":
        return str(lab.name("replica"))
    sector = 4096 if kind in ("zram", "loop-4096") else 512
    return lab.loop(BlockDevice.find(device).size, sector=sector)


@needs_devices
@every_kind
@pytest.mark.parametrize("epochs", ["one", "many"])
def test_tracked_extents_cover_every_difference(
    shared: Lab, seed: int, kind: str, epochs: str
) -> None:
    paths, filesystem = make(shared, kind)
    cover(shared, seed, paths, filesystem, epochs=epochs)


@pytest.mark.soak
@needs_devices
@every_kind
def test_tracked_extents_cover_every_difference_for_long(shared: Lab, seed: int, kind: str) -> None:
    for number in range(20):
        with shared.fresh() as other:
            paths, filesystem = make(other, kind)
            cover(other, seed + 100 * number, paths, filesystem, count=200)


@needs_devices
@every_kind
@pytest.mark.parametrize("replica", ["file", "device"])
def test_replica_is_identical_after_syncs_under_load(
    shared: Lab, seed: int, kind: str, replica: str
) -> None:
    paths, filesystem = make(shared, kind)
    replicate(shared, seed, paths, filesystem, replica_of(shared, kind, paths[0], replica))


@pytest.mark.soak
@needs_devices
@every_kind
def test_replica_is_identical_after_syncs_under_load_for_long(
    shared: Lab, seed: int, kind: str
) -> None:
    for number in range(20):
        with shared.fresh() as other:
            paths, filesystem = make(other, kind)
            target = str(other.name("replica"))
            replicate(other, seed + 100 * number, paths, filesystem, target, count=200)


# What breaks the programs: the text replaced, the text that replaces it, and where it shows.
BREAKAGES = {
    "as it is": ("", "", ("loop-512", "partition-512", "zram")),
    # The account (test_account.py) is not broken by any of these: they mark the wrong granules.
    "a large change is counted and not marked when completed": (
        "	map = bpf_map_lookup_elem(MAP(MAP_PLANES), &slot);\n",
        "	map = bpf_map_lookup_elem(MAP(MAP_PLANES), &slot);\n"
        "	if (plane == COMPLETED && end - first > 8192)\n		map = 0;\n",
        ("loop-512",),
    ),
    "half of a bio is remembered": (
        "	entry.bytes = bytes;\n",
        "	entry.bytes = bytes >> 1;\n",
        ("zram",),
    ),
    "a partition's window is taken for the disk": (
        "(first - w->start) >> w->shift, (end - 1 - w->start) >> w->shift",
        "first >> w->shift, (end - 1) >> w->shift",
        ("partition-512",),
    ),
    "the last granule of a range is left out": (
        "tail = ~0ULL >> (63 - (last & 63))",
        "tail = ~0ULL >> 1 >> (63 - (last & 63))",
        ("loop-512", "zram"),
    ),
    "the first granule of a range is left out": (
        "head = ~0ULL << (first & 63)",
        "head = ~1ULL << (first & 63)",
        ("loop-512",),
    ),
    "full words are not passed up": (
        "		last = high;\n",
        "		last = low;\n",
        ("loop-512",),
    ),
    "the higher levels start in the wrong place": (
        "u32 words = base + w->level[level];",
        "u32 words = base + w->level[level] + (level > 0);",
        ("loop-512",),
    ),
}


def broken_programs(lab: Lab, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Let programs be compiled from a copy of their text in which `old` became `new`."""
    copy = lab.name("bpf")
    shutil.copytree(compile._HERE, copy)
    changed = 0
    for file in (copy / "track.c", copy / "track.h"):
        text = file.read_text(encoding="utf-8")
        if old:
            changed += text.count(old)
            file.write_text(text.replace(old, new), encoding="utf-8")
    assert changed == bool(old), f"the programs no longer say {old!r}"
    monkeypatch.setattr(compile, "_HERE", copy)


def change_everywhere(path: str, seed: int) -> None:
    """One change of each kind that the programs treat differently, at rest at the end."""
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDWR)
    try:
        linux.discard(fd, 4 * MIB + 16 * KIB, 6 * MIB)
        linux.zero_out(fd, 20 * MIB + 4 * KIB, MIB)
    finally:
        os.close(fd)
    # Whole words of granules and parts of them.
    write_direct(path, 32 * MIB + 12 * KIB, rng.randbytes(2 * MIB))
    write_direct(path, 40 * MIB, rng.randbytes(4 * KIB))


@needs_devices
@pytest.mark.needs("zram")
@pytest.mark.parametrize(
    ("breakage", "kind"), [(name, kind) for name, row in BREAKAGES.items() for kind in row[2]]
)
def test_oracle_finds_broken_programs(
    lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch, breakage: str, kind: str
) -> None:
    old, new, _ = BREAKAGES[breakage]
    broken_programs(lab, monkeypatch, old, new)
    device = lab.device(kind, 64 * MIB)[0]
    watch = lab.track(device)
    # A completion that no program saw, which the host may bring about at any time, has the
    # submitted planes stand in for the others, and so for what is broken: then once more.
    for turn in range(3 if old else 1):
        fill(device)
        watch.take()
        before = read_image(device)
        change_everywhere(device, seed + turn)
        lost = missed(before, read_image(device), watch.take())
        if len(lost):
            break
    assert bool(len(lost)) == bool(old), f"{len(lost)} sectors changed untracked, first {lost[:8]}"


@pytest.mark.needs("root", "loop", "bpf")
def test_oracle_finds_a_map_read_and_cleared_in_use(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the swap, marks between the reading and the clearing of a map are lost."""
    device = shared.loop(64 * MIB)
    fill(device)
    watch = shared.track(device)
    before = read_image(device)
    clear, late = Planes.clear, iter(range(8 * KIB, 256 * KIB, 4 * KIB))

    def clear_late(planes: Planes, found: list[Indices]) -> None:
        """Another block of the same word changes just before the clearing."""
        offset = next(late)
        write_direct(device, offset, sectors.make(offset, 4 * KIB, 2))
        clear(planes, found)

    def drain() -> None:
        write_direct(device, 4 * KIB, sectors.make(4 * KIB, 4 * KIB, 1))
        with monkeypatch.context() as patch:
            patch.setattr(Planes, "clear", clear_late)
            watch.drain()

    drain()
    assert not len(missed(before, read_image(device), watch.take())), "with the swap all is well"
    before = read_image(device)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "swap", lambda self, slot, retired: None)
        for _ in range(2):  # one of the two meets the map that the programs are writing to
            drain()
    assert len(missed(before, read_image(device), watch.take()))


@pytest.mark.needs("root", "loop", "bpf")
def test_oracle_finds_a_dropped_extent(shared: Lab, seed: int) -> None:
    device = shared.loop(64 * MIB)
    watch = shared.track(device)
    before = read_image(device)
    change_everywhere(device, seed)
    fill_last = MIB
    write_direct(device, 64 * MIB - fill_last, sectors.make(64 * MIB - fill_last, fill_last, 1))
    after, tracked = read_image(device), watch.take()
    assert not len(missed(before, after, tracked))
    lost = missed(before, after, tracked[:-1])
    assert lost.tolist() == list(range(63 * MIB // SECTOR, 64 * MIB // SECTOR))
    assert len(missed(before, after, empty())) == len(sectors.differing(before, after))


@pytest.mark.needs("root", "loop", "bpf")
def test_oracle_finds_an_extent_that_was_not_shipped(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, target = shared.loop(16 * MIB), str(shared.name("replica"))
    fill(device)
    shared.track(device)
    shared.sync(device, target)
    write_direct(device, MIB, sectors.make(MIB, 64 * KIB, 1))
    write_direct(device, 3 * MIB, sectors.make(3 * MIB, 8 * KIB, 2))
    take = LinkSets.take
    monkeypatch.setattr(LinkSets, "take", lambda self: take(self)[:-1])
    shared.sync(device, target)
    found = sectors.faults(read_image(device), read_image(target))
    assert [fault.offset for fault in found] == list(range(3 * MIB, 3 * MIB + 8 * KIB, SECTOR))
    assert {fault.kind for fault in found} == {"stale"}


def test_sectors_tell_what_went_wrong() -> None:
    source = sectors.make(0, 16 * SECTOR, 5)
    source[15 * SECTOR :] = 7  # a file system's
    replica = source.copy()
    replica[1 * SECTOR : 2 * SECTOR] = 0
    replica[3 * SECTOR : 4 * SECTOR] = sectors.make(3 * SECTOR, SECTOR, 4)
    replica[5 * SECTOR : 6 * SECTOR] = source[6 * SECTOR : 7 * SECTOR]
    replica[8 * SECTOR : 8 * SECTOR + 256] = sectors.make(8 * SECTOR, SECTOR, 4)[:256]
    replica[10 * SECTOR + 64 : 11 * SECTOR] = 0
    source[12 * SECTOR : 13 * SECTOR] = 0  # discarded since
    replica[15 * SECTOR] ^= 1
    found = sectors.faults(source, replica)
    assert [(fault.offset // SECTOR, fault.kind) for fault in found] == [
        (1, "lost"),
        (3, "stale"),
        (5, "misplaced"),
        (8, "torn"),
        (10, "torn"),
        (12, "stale"),
        (15, "unknown"),
    ]
    assert "write 5 of the source never came" in sectors.describe(found)


def test_uncovered_is_exact_at_the_edges() -> None:
    tracked = np.array([[SECTOR, 2 * SECTOR], [8 * SECTOR, 4 * SECTOR]], dtype=np.int64)
    changed = np.arange(14, dtype=np.int64)
    assert sectors.uncovered(changed, tracked).tolist() == [0, 3, 4, 5, 6, 7, 12, 13]
    assert sectors.uncovered(changed, empty()).tolist() == changed.tolist()
