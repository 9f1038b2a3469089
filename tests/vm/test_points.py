"""Points equal the write log of their source up to an instant, give or take what was in flight."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blktrack.units import MIB
from tests.blockdev import told
from tests.vm.instants import History, Segment, Trace
from tests.vm.taker import FILES, RAW, Point
from tests.vm.writelog import WriteLog, digests
from tools.vm import kernels, packages
from tools.vm.disk import Disk
from tools.vm.machine import Machine

Digests = NDArray[np.uint64]

pytestmark = [
    pytest.mark.needs("root", "qemu-system-x86_64", "depmod"),
    pytest.mark.timeout(1800),
]

# Of each stack: serial number, kind, sector, MiB, writes a second. On slow ones many are in flight.
DISKS = {
    "virtio-blk": [("blk", "virtio-blk", 512, 8, 200)],
    "nvme-4096": [("nvme4k", "nvme", 4096, 8, 0)],
    "virtio-scsi-partition": [("scsi", "virtio-scsi", 512, 8, 100)],
    "lvm-linear": [("lv1", "virtio-blk", 512, 6, 0), ("lv2", "nvme", 512, 5, 100)],
    "md-raid1": [("md1", "virtio-blk", 512, 9, 0), ("md2", "virtio-scsi", 512, 9, 100)],
}
# Each kernel has three stacks, each stack two kernels where that goes.
STACKS = {
    "6.1": ("virtio-blk", "lvm-linear", "md-raid1"),
    "6.12": ("nvme-4096", "virtio-scsi-partition", "lvm-linear"),
    "newest": ("virtio-scsi-partition", "nvme-4096", "md-raid1"),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: each entry of a log is made durable, which takes a disk its time."""
    made = Path(tempfile.mkdtemp(prefix="blktrack-points-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


def test_points_are_of_one_instant_of_the_write_log(kernel: str, seed: int, folder: Path) -> None:
    made = []
    for serial, kind, sector, size, rate in itertools.chain(
        *(DISKS[name] for name in STACKS[kernel])
    ):
        image, log = folder / f"{serial}.img", folder / f"{serial}.log"
        made.append(Disk(serial, image, kind, sector, log, rate=rate))
        made[-1].create(size * MIB)
    layer = packages.guest_layer()
    with Machine(kernels.kernel(kernel), layer, folder, made, memory=1024) as machine:
        words = [sys.executable, "-B", "-m", "tests.vm.taker", str(seed), *STACKS[kernel]]
        machine.start(" ".join(words))
        code = machine.wait(1500)
        assert code == 0, machine.tail()
    logs = {disk.serial: WriteLog(folder / f"{disk.serial}.log") for disk in made}
    for disk in made:
        whole_is_the_image(logs[disk.serial], disk.image)
    count = sum(judged(folder / "share" / name, kernel, logs) for name in STACKS[kernel])
    assert count >= len(STACKS[kernel]) * (RAW + FILES) // 2


def whole_is_the_image(log: WriteLog, image: Path) -> None:
    """The log is true: all of it makes what the disk has become."""
    held = np.fromfile(image, dtype=np.uint8)
    replayed = np.zeros_like(held)
    log.replay(replayed)
    wrong = np.flatnonzero(digests(held) != digests(replayed))
    assert not len(wrong), f"{image}: {len(wrong)} sectors are not in its log, {wrong[:4]}"


def mixed(points: Digests) -> Iterator[Digests]:
    """False points: one half of each, and the other of the next."""
    half = points.shape[1] // 2
    for one, other in itertools.pairwise(points):
        yield np.concatenate([one[:half], other[half:]])


def judged(name: Path, kernel: str, logs: dict[str, WriteLog]) -> int:
    """How many points of a stack there were. Each is of an instant during its sync."""
    about: dict[str, Any] = json.loads(name.with_suffix(".json").read_text(encoding="ascii"))
    assert "overrun: 0\n" in about["trace"], about["trace"]
    with name.with_suffix(".trace").open(encoding="utf-8", errors="replace") as lines:
        trace = Trace(lines, tuple(about["device"]), about["start"], about["bio"])
    points = np.load(name.with_suffix(".npy"))
    always = 0, max(trace.marks.values())
    taken, sectors = [Point(*each) for each in about["points"]], []
    for segments in about["segments"]:
        segments = [Segment(*each) for each in segments]
        history = History(logs, segments, trace, about["size"])
        assert (history.newest() == points[-1]).all(), f"{name.name}: the log misses writes"
        # What made the volume wrote before it was traced.
        assert about["bio"] or not history.undated, f"{name.name}: the trace misses writes"
        for point, held in zip(taken, points, strict=False):
            span = trace.marks[f"begin {point.number}"], trace.marks[f"end {point.number}"]
            verdict = history.judge(held, *span)
            assert verdict.instants, f"{name.name}, {point}: {verdict.fault}"
            sectors.append(verdict.prefix)
        noticed = sum(not history.judge(each, *always).instants for each in mixed(points[:-1]))
        assert noticed >= len(taken) // 2, f"{name.name}: false points are taken for true ones"
    told(
        f"{kernel}, {name.name}: {len(taken)} points of {about['tried']} tries are of an instant "
        f"of the log ({len(trace.changes)} changes), "
        f"{sum(p.changes for p in taken)} changes meanwhile, rounds "
        f"{[p.rounds for p in taken]}, {sectors.count(0)} a prefix to the sector, others with "
        f"up to {max(sectors)} sectors in flight"
    )
    return len(taken)
