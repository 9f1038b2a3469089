"""The ways of changing a device that kernels show differently, each tried at a place of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from blktrack import linux
from blktrack.probe import ioctls, throttle
from blktrack.probe.bench import LARGEST, Bench, Range, Unseen, Watched
from blktrack.probe.devices import Absent
from blktrack.probe.room import PATIENCE
from blktrack.sysfs import BlockDevice
from blktrack.units import KIB, MIB

ROOM = 8 * MIB  # of the device, for one probe


@dataclass(frozen=True)
class Probe:
    name: str
    told: str  # in the table of the battery
    run: Callable[[Bench, int], list[Range]]  # changes made to the device, all within ROOM
    quick: bool = True


def _disk(bench: Bench, place: int) -> list[Range]:
    """Next to each other, in parts of granules, across the edge of a word."""
    block = bench.device.block_size
    return [
        bench.write(place + 4 * KIB, 12 * KIB),
        bench.write(place + 512 * KIB + 4 * KIB - block, 2 * block),
        bench.write(place + MIB - block, block),
    ]


def _partition(bench: Bench, place: int) -> list[Range]:
    """Written through itself and through its disk, which both have to show it."""
    block = bench.device.block_size
    start, length = place + 63 * block, 4 * MIB + block
    try:
        ioctls.add_partition(bench.fd, 1, start, length)
    except OSError as error:
        # EINVAL: GENHD_FL_NO_PART, as zram and device-mapper have it
        raise Absent(f"such a device takes no partition ({error.strerror})") from error
    try:
        part = _first_partition(bench.device)
        watched = Watched(bench.kernel, part)
        fd = os.open(part.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            inside = [bench.write(8 * KIB, 4 * KIB, fd=fd), bench.write(2 * MIB, MIB, fd=fd)]
        finally:
            os.close(fd)
        through = bench.write(place + 64 * KIB, block)
        beside = bench.write(place + 6 * MIB, 4 * KIB)
        watched.check([*inside, (through[0] - start, block)])
        return [*((start + at, size) for at, size in inside), through, beside]
    finally:
        _until_done(lambda: ioctls.remove_partition(bench.fd, 1))


def _first_partition(disk: BlockDevice) -> BlockDevice:
    deadline = time.monotonic() + PATIENCE
    while True:
        for part in disk.partitions:
            if os.path.exists(part.path):
                return part
        if time.monotonic() > deadline:
            raise Absent("the partition does not appear in /dev")
        time.sleep(0.001)


def _until_done(work: Callable[[], None]) -> None:
    """udev may have a look at a new partition. What is left of it goes with the device."""
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(OSError):
        while True:
            try:
                return work()
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.001)


def _page_cache(bench: Bench, place: int) -> list[Range]:
    """Adjacent writes, which the kernel merges."""
    fd = os.open(bench.device.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        written = [bench.write(place + n * 4 * KIB, 4 * KIB, fd=fd) for n in (1, 2, 3, 64, 130)]
        os.fsync(fd)
    finally:
        os.close(fd)
    return written


def _zeroes(bench: Bench, place: int) -> list[Range]:
    """Kept allocated. A device that cannot is written zeroes, and then not even asked to free."""
    changed = (place + 4 * KIB, MIB)
    linux.zero_out(bench.fd, *changed)
    return [changed]


def _punch(bench: Bench, place: int) -> list[Range]:
    changed = (place + 12 * KIB, 2 * MIB)
    try:
        linux.punch_hole(bench.fd, *changed)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise Absent("such a device cannot zero and free at once") from error
    return [changed]


def _discard(bench: Bench, place: int) -> list[Range]:
    changed = (place + 16 * KIB, 2 * MIB + 4 * KIB)
    try:
        linux.discard(bench.fd, *changed)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise Absent("such a device takes no discards") from error
    return [changed]


def _flush(bench: Bench, place: int) -> list[Range]:
    """A flush changes nothing; a write that has to be durable (FUA) may end twice."""
    os.fsync(bench.fd)
    bench.watched.check([])
    return [
        bench.write(place + 4 * KIB, 8 * KIB, flags=os.RWF_DSYNC),
        bench.write(place + MIB, 4 * KIB, flags=os.RWF_SYNC),
    ]


def _split(bench: Bench, place: int) -> list[Range]:
    return [bench.write(place + 12 * KIB, LARGEST)]


def _throttle(bench: Bench, place: int) -> list[Range]:
    """Linux 5.18 to early 6.1.y and 6.2.y: no event for a bio that had to wait."""
    return [throttle.write(bench.room, bench.device, place + 512 * KIB)]


def _swap(bench: Bench, place: int) -> list[Range]:
    """The end of an epoch: marks are in one map before, in the other after."""
    first = bench.write(place, 64 * KIB)
    bench.watched.swap()
    second = bench.write(place + MIB, 64 * KIB)
    if bench.watched.has(first)[0] or bench.watched.has(second)[1]:
        raise Unseen("marks were made in the wrong one of the two maps")
    return [first, second]


PROBES = (
    Probe("disk", "writes to the disk", _disk),
    Probe("partition", "writes to a partition", _partition),
    Probe("page-cache", "through the page cache", _page_cache),
    Probe("punch", "zeroing that frees", _punch),
    Probe("zeroes", "zeroing", _zeroes),
    Probe("discard", "discards", _discard),
    Probe("flush", "flush and FUA", _flush),
    Probe("split", "a write of 4 MiB, split", _split),
    Probe("throttle", "under a cgroup's limit", _throttle),
    Probe("swap", "the end of an epoch", _swap),
)
