"""Exactly what changed is marked, to the granule: at every edge, of every size, on every device."""

from __future__ import annotations

import math
import mmap
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from blktrack import extent, linux
from blktrack.bpf.windows import Windows
from blktrack.sysfs import BlockDevice
from blktrack.tracker.tracking import Gap
from blktrack.units import GIB, KIB, MIB, SECTOR
from tests.blockdev import Lab, Watch, flush, pairs, read_image, told, write_direct
from tests.fixtures import every_kind
from tests.uring import discard_at_once

pytestmark = pytest.mark.needs("root", "loop", "bpf")

TIB = 1 << 40
LARGEST_DISCARD = 4 * GIB - SECTOR  # what one bio can carry (bi_size has 32 bits)

Range = tuple[int, int]
Ranges = list[Range]


def granules(changed: Iterable[Range], granularity: int, size: int) -> Ranges:
    """The model: (start, length) ranges, clipped to a device and widened to whole granules."""
    rounded = []
    for start, length in changed:
        first, end = max(start, 0), min(start + length, size)
        if first < end:
            first = first // granularity * granularity
            end = min(-(-end // granularity) * granularity, size)
            rounded.append((first, end - first))
    return pairs(extent.from_pairs(rounded))


def taken(watch: Watch) -> Ranges:
    """What changed since the last call; all of it submitted and completed, nothing lost."""
    look = watch.look()
    submitted, drained = pairs(look.submitted), pairs(look.drained)
    assert not any(look.losses.values()), look.losses
    if look.unseen:
        # A kernel that ran no program for a completion (test_account.py): covered, not exact.
        told(f"{look.unseen} bytes were not seen to end by any program, and covered")
        assert pairs(extent.from_pairs(submitted + drained)) == drained
    else:
        assert submitted == pairs(look.completed) == drained
    return submitted


def write(path: str, start: int, length: int) -> None:
    write_direct(path, start, os.urandom(length))


def discard(path: str, start: int, length: int) -> None:
    _on(path, linux.discard, start, length)


def zero_out(path: str, start: int, length: int) -> None:
    _on(path, linux.zero_out, start, length)


def _on(path: str, call: Callable[[int, int, int], None], start: int, length: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        call(fd, start, length)
    finally:
        os.close(fd)


CHANGES = (write, discard, zero_out)


class Death(Exception):
    """Stands for SIGKILL: nothing that follows is done."""


@every_kind
def test_64_kib(shared: Lab, kind: str) -> None:
    device = shared.device(kind, 64 * MIB)[0]
    watch = shared.track(device)
    assert taken(watch) == []
    for change in CHANGES:
        change(device, MIB, 64 * KIB)
        assert taken(watch) == [(MIB, 64 * KIB)]
        assert taken(watch) == []


@every_kind
def test_first_and_last_block(shared: Lab, kind: str) -> None:
    device = shared.device(kind, 64 * MIB)[0]
    found = BlockDevice.find(device)
    size, block = found.size, found.block_size
    watch = shared.track(device, block)
    for change in CHANGES:
        for start in (0, size - block):
            change(device, start, block)
            assert taken(watch) == [(start, block)]


def test_a_last_granule_cut_by_the_end(shared: Lab) -> None:
    size = 64 * MIB + 3 * SECTOR
    device = shared.loop(size)
    watch = shared.track(device, 64 * KIB)
    write(device, size - SECTOR, SECTOR)
    assert taken(watch) == [(64 * MIB, 3 * SECTOR)]


@every_kind
def test_a_prime_count(shared: Lab, seed: int, kind: str) -> None:
    """23 writes to 23 separate granules are 23 bits."""
    device = shared.device(kind, 64 * MIB)[0]
    watch = shared.track(device, 4 * KIB)
    places = random.Random(seed).sample(range(0, 64 * MIB // (4 * KIB), 2), 23)
    for place in places:
        write(device, place * 4 * KIB, 4 * KIB)
    found = taken(watch)
    assert len(found) == 23
    assert found == [(place * 4 * KIB, 4 * KIB) for place in sorted(places)]


@pytest.mark.parametrize("granularity", [SECTOR, 4 * KIB, 64 * KIB, MIB])
def test_across_the_edge_of_a_word_and_a_granule(shared: Lab, granularity: int) -> None:
    device = shared.loop(256 * MIB)
    watch = shared.track(device, granularity)
    word = 64 * granularity
    write(device, word - SECTOR, 2 * SECTOR)
    assert taken(watch) == [(word - granularity, 2 * granularity)]
    write(device, word - SECTOR, SECTOR)
    assert taken(watch) == [(word - granularity, granularity)]
    write(device, word, SECTOR)
    assert taken(watch) == [(word, granularity)]
    discard(device, word, word)
    assert taken(watch) == [(word, word)]
    discard(device, word - SECTOR, word + 2 * SECTOR)
    assert taken(watch) == [(word - granularity, word + 2 * granularity)]


@pytest.mark.parametrize("granularity", [SECTOR, 4 * KIB, 64 * KIB, MIB])
def test_random_ranges(shared: Lab, seed: int, granularity: int) -> None:
    """Against the model, of every size that a device can be asked to change at once."""
    size = 16 * GIB + 24 * KIB
    device = shared.loop(size)
    watch = shared.track(device, granularity)
    rng = random.Random(seed)
    for _ in range(60):
        changed = []
        for _ in range(rng.randrange(1, 8)):
            change, largest = rng.choice([(write, MIB), (discard, 8 * GIB), (zero_out, MIB)])
            length = int(2 ** rng.uniform(0, math.log2(largest // SECTOR))) * SECTOR
            unit = rng.choice([SECTOR, 64 * granularity, 4096 * granularity])
            start = rng.randrange((size - length) // unit + 1) * unit
            change(device, start, length)
            changed.append((start, length))
        assert taken(watch) == granules(changed, granularity, size), f"{changed}"


@pytest.mark.needs("zram")
@pytest.mark.parametrize("kind", ["loop-512", "loop-4096", "zram"])
def test_a_discard_of_1_gib(shared: Lab, kind: str) -> None:
    device = shared.device(kind, 4 * GIB)[0]
    watch = shared.track(device, 4 * KIB)
    discard(device, GIB + 4 * KIB, GIB)
    assert taken(watch) == [(GIB + 4 * KIB, GIB)]


@pytest.mark.parametrize("granularity", [SECTOR, 4 * KIB, MIB])
def test_the_largest_discard(shared: Lab, granularity: int) -> None:
    device = shared.loop(16 * GIB)
    watch = shared.track(device, granularity)
    for start in (0, SECTOR, 5 * GIB - SECTOR, 12 * GIB + SECTOR):
        discard(device, start, LARGEST_DISCARD)
        assert taken(watch) == granules([(start, LARGEST_DISCARD)], granularity, 16 * GIB)


def test_a_device_of_16_tib(shared: Lab) -> None:
    size = 16 * TIB
    device = shared.loop(size)
    watch = shared.track(device)
    granularity = watch.state.granularity
    assert granularity == 512 * KIB  # at 256 KiB both maps would take a little over 32 MiB
    changed = [(0, SECTOR), (size - SECTOR, SECTOR), (7 * TIB + SECTOR, LARGEST_DISCARD)]
    write(device, *changed[0])
    write(device, *changed[1])
    discard(device, *changed[2])
    assert taken(watch) == granules(changed, granularity, size)
    discard(device, 0, size)
    assert taken(watch) == [(0, size)]


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_edges_of_a_partition(shared: Lab, sector: int) -> None:
    """Seen from the partition, and from the disk: only what is inside is marked, at its place."""
    disk = shared.loop(64 * MIB, sector=sector)
    start, size = 63 * sector, 10001 * sector
    end = start + size
    device = shared.partition(disk, 1, start, size)
    watch = shared.track(device, sector)
    last = size - sector
    for change in CHANGES:
        cases: list[tuple[str, Range, Ranges]] = [
            (device, (0, sector), [(0, sector)]),
            (device, (last, sector), [(last, sector)]),
            (disk, (start - sector, sector), []),
            (disk, (end, sector), []),
            (disk, (0, start), []),
            (disk, (end, MIB), []),
            (disk, (start, sector), [(0, sector)]),
            (disk, (end - sector, sector), [(last, sector)]),
            (disk, (start - 2 * sector, 5 * sector), [(0, 3 * sector)]),
            (disk, (end - 3 * sector, 5 * sector), [(size - 3 * sector, 3 * sector)]),
            (disk, (0, 63 * MIB), [(0, size)]),
        ]
        for path, changed, expected in cases:
            change(path, *changed)
            assert taken(watch) == expected, (change, path, changed)


def test_a_partition_counts_its_granules_from_its_own_start(shared: Lab) -> None:
    disk = shared.loop(64 * MIB)
    device = shared.partition(disk, 1, 63 * SECTOR, 32 * MIB)
    watch = shared.track(device, 64 * KIB)
    write(disk, 63 * SECTOR + 64 * KIB - SECTOR, 2 * SECTOR)
    assert taken(watch) == [(0, 128 * KIB)]


def test_a_disk_and_two_of_its_partitions_at_once(shared: Lab, seed: int) -> None:
    disk = shared.loop(64 * MIB)
    places = [(63 * SECTOR, 10001 * SECTOR), (16 * MIB, 20 * MIB)]
    parts = [shared.partition(disk, n + 1, *place) for n, place in enumerate(places)]
    windows = [(disk, 0, 64 * MIB), *((p, *place) for p, place in zip(parts, places, strict=True))]
    watches = [shared.track(path, 4 * KIB) for path, _, _ in windows]
    rng = random.Random(seed)
    for _ in range(40):
        path, start, size = rng.choice(windows)
        length = rng.randrange(1, 64) * SECTOR
        offset = rng.randrange((size - length) // SECTOR) * SECTOR
        rng.choice([write, discard, zero_out])(path, offset, length)
        for watch, (_, first, whole) in zip(watches, windows, strict=True):
            expected = granules([(start + offset - first, length)], 4 * KIB, whole)
            assert taken(watch) == expected, (path, offset, length)


@pytest.mark.needs("zram")
def test_twelve_devices_at_once(shared: Lab) -> None:
    devices = [shared.loop(16 * MIB, sector=sector) for sector in (512, 4096) for _ in range(4)]
    devices += [shared.zram(16 * MIB) for _ in range(2)]
    devices += [shared.device("partition-512", 16 * MIB)[0] for _ in range(2)]
    watches = [shared.track(device, 4 * KIB) for device in devices]
    for number, device in enumerate(devices):
        write(device, (number + 1) * MIB, (number + 1) * 4 * KIB)
    for number, watch in enumerate(watches):
        assert taken(watch) == [((number + 1) * MIB, (number + 1) * 4 * KIB)]
    for watch in watches[::2]:
        shared.untrack(watch.path)
    for number, device in enumerate(devices):
        write(device, number * 8 * KIB, 4 * KIB)
    for number, watch in enumerate(watches):
        if number % 2:
            assert taken(watch) == [(number * 8 * KIB, 4 * KIB)]


def merged_discards(disk: str, ranges: Ranges) -> None:
    """One request of as many bios. Skips the test where the kernel cannot be asked for that."""
    counts = Path(f"/sys/block/{Path(disk).name}/stat")
    before = counts.read_text(encoding="ascii").split()
    try:
        discard_at_once(disk, ranges)
    except OSError as error:
        pytest.skip(f"no batches of discards: {error.strerror}")
    after = counts.read_text(encoding="ascii").split()
    assert [int(after[n]) - int(before[n]) for n in (11, 12)] == [1, len(ranges) - 1]


def test_merged_discards(shared: Lab) -> None:
    """Each bio of the request is marked, for each tracked device of the disk."""
    disk = shared.loop(64 * MIB)
    part = shared.partition(disk, 1, 2 * MIB - 63 * SECTOR, 32 * MIB)
    whole = shared.track(disk, SECTOR)
    merged_discards(disk, [(MIB + n * 8 * KIB, 8 * KIB) for n in range(256)])
    assert taken(whole) == [(MIB, 256 * 8 * KIB)]
    inner = shared.track(part, 4 * KIB)
    for count in (3, 23, 128):
        merged_discards(disk, [(MIB + n * 8 * KIB, 8 * KIB) for n in range(count)])
        assert taken(whole) == [(MIB, count * 8 * KIB)]
        inside = (63 * SECTOR - MIB, count * 8 * KIB)
        assert taken(inner) == granules([inside], 4 * KIB, 32 * MIB)


def test_merged_discards_beside_a_slot_that_was_never_linked(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk goes from slot to slot of a disk; a death while one is added must not divert it."""
    other, disk = shared.loop(MIB), shared.loop(64 * MIB)
    part = shared.partition(disk, 1, 2 * MIB, 32 * MIB)
    before = shared.track(other)
    whole = shared.track(disk, SECTOR)
    slot = before.state.slot
    assert slot < whole.state.slot
    shared.untrack(other)

    relink, calls = Windows._relink, iter(range(2))

    def die_at_last(windows: Windows) -> None:
        if next(calls):
            raise Death
        relink(windows)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "_relink", die_at_last)
        with pytest.raises(Death):
            shared.track(part)
    merged_discards(disk, [(MIB + n * 8 * KIB, 8 * KIB) for n in range(23)])
    assert taken(whole) == [(MIB, 23 * 8 * KIB)]
    assert shared.track(part).state.slot == slot


def test_more_merged_discards_than_can_be_followed(shared: Lab) -> None:
    """They are never passed over in silence."""
    disk = shared.loop(64 * MIB)
    watch = shared.track(disk)
    merged_discards(disk, [(MIB + n * 8 * KIB, 8 * KIB) for n in range(300)])
    with pytest.raises(Gap, match="more ranges than can be followed"):
        watch.take()


@every_kind
def test_reading_marks_nothing(shared: Lab, kind: str) -> None:
    device = shared.device(kind, 64 * MIB)[0]
    watch = shared.track(device)
    read_image(device)
    fd = os.open(device, os.O_RDWR)
    try:
        while os.read(fd, MIB):
            pass
        os.fsync(fd)  # a flush, of nothing
    finally:
        os.close(fd)
    flush(device)
    assert taken(watch) == []


@every_kind
def test_buffered_writes_mark_their_pages(shared: Lab, kind: str) -> None:
    """When they are written back: small ones that meet merge into one request."""
    device = shared.device(kind, 64 * MIB)[0]
    watch = shared.track(device, 4 * KIB)
    fd = os.open(device, os.O_RDWR)
    try:
        for page in range(8):
            os.pwrite(fd, b"x" * 100, MIB + page * 4 * KIB + 10)
        os.pwrite(fd, b"x" * 100, 2 * MIB - 50)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert taken(watch) == [(MIB, 32 * KIB), (2 * MIB - 4 * KIB, 8 * KIB)]


@every_kind
def test_a_mapping_marks_its_pages(shared: Lab, kind: str) -> None:
    device = shared.device(kind, 64 * MIB)[0]
    watch = shared.track(device, 4 * KIB)
    fd = os.open(device, os.O_RDWR)
    try:
        with mmap.mmap(fd, 64 * KIB, offset=MIB) as memory:
            memory[0] = memory[40 * KIB] = 7
            memory.flush()
    finally:
        os.close(fd)
    assert taken(watch) == [(MIB, 4 * KIB), (MIB + 40 * KIB, 4 * KIB)]


@pytest.mark.parametrize("scheduler", ["none", "mq-deadline", "kyber", "bfq"])
def test_every_scheduler(shared: Lab, seed: int, scheduler: str) -> None:
    """They merge, split and reorder what is marked."""
    device = shared.loop(64 * MIB)
    setting = Path(f"/sys/block/{Path(device).name}/queue/scheduler")
    if scheduler not in setting.read_text(encoding="ascii"):
        pytest.skip(f"the kernel has no {scheduler}")
    setting.write_text(scheduler, encoding="ascii")
    watch = shared.track(device)
    rng = random.Random(seed)
    fd = os.open(device, os.O_RDWR)
    try:
        for _ in range(10):
            changed = [
                (rng.randrange(16 * 1024) * 4 * KIB, rng.randrange(1, 9) * 4 * KIB)
                for _ in range(40)
            ]
            for start, length in changed:
                os.pwrite(fd, os.urandom(min(length, 64 * MIB - start)), start)
            os.fsync(fd)
            assert taken(watch) == granules(changed, 4 * KIB, 64 * MIB)
    finally:
        os.close(fd)
