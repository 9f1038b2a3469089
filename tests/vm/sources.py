"""Inside a machine: `crash` points of sources on logged disks, while they are written to.

    python -m tests.vm.sources SEED STACK...

For each stack the share gets NAME.trace, what the kernel saw; NAME.npy, the digests of the sectors
of each point and, in the last row, of the source in the end; NAME.json, where its
sectors lie on the logged disks.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from blktrack import linux, sync
from blktrack.errors import NoPoint
from blktrack.options import Options
from blktrack.units import KIB, SECTOR
from tests.blockdev import (
    Lab,
    Silent,
    despite_collisions,
    flush,
    lab_in_memory,
    read_image,
    run,
    wait_until,
)
from tests.oracle import fill
from tests.vm import disks
from tests.vm.compiled import compile_once
from tests.vm.instants import Segment
from tests.vm.writelog import digests
from tests.workload import RawMix, make_filesystem, together, trim
from tools.vm.initramfs import SHARE

RAW, FILES = 7, 5  # points of each stack: of the bare device, of a file system
TRIES = 4  # for each of them
MOST = 30  # rounds, after which there is no point
LARGEST = 256 * KIB  # change: in rounds of more than that no point would be reached
TRACING = Path("/sys/kernel/tracing")
EVENTS = ("rq_issue", "rq_requeue", "rq_complete", "bio_queue", "bio_complete")


@dataclass(frozen=True)
class Source:
    path: str
    size: int
    segments: list[list[Segment]]  # all of it; once for each mirror
    start: int = 0  # of a partition
    disk: str = ""  # whose partition it is
    bio: bool = False


# Stacks


def number(path: str) -> tuple[int, int]:
    found = os.stat(path).st_rdev
    return os.major(found), os.minor(found)


def size_of(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return linux.device_size(fd)
    finally:
        os.close(fd)


def whole(lab: Lab, serial: str) -> Source:
    path = disks.find(serial)
    size = size_of(path)
    return Source(path, size, [[Segment(0, size, serial, 0)]])


def partition(lab: Lab, serial: str) -> Source:
    """Of odd edges."""
    disk = disks.find(serial)
    start = 63 * SECTOR
    size = size_of(disk) - start - 17 * SECTOR
    run("addpart", disk, "1", str(start // SECTOR), str(size // SECTOR))
    path = f"{disk}1"
    wait_until(lambda: Path(path).exists(), path)
    lab.stack.callback(run, "delpart", disk, "1")
    return Source(path, size, [[Segment(0, size, serial, start)]], start, disk)


def linear(lab: Lab, *serials: str) -> Source:
    """A logical volume over disks of which none can hold it."""
    run("modprobe", "dm-mod")
    paths = {disks.find(serial): serial for serial in serials}
    run("vgcreate", "-q", "-s", "1m", "pointvg", *paths)
    lab.stack.callback(run, "vgremove", "-q", "-f", "-y", "pointvg")
    run("lvcreate", "-q", "-y", "-W", "n", "-n", "lv", "-l", "100%FREE", "pointvg")
    names = {"{}:{}".format(*number(path)): serial for path, serial in paths.items()}
    segments = []
    for line in run("dmsetup", "table", "pointvg-lv").splitlines():
        first, count, _, lower, at = line.split()
        where = names[lower], int(at) * SECTOR
        segments.append(Segment(int(first) * SECTOR, int(count) * SECTOR, *where))
    path = "/dev/mapper/pointvg-lv"
    return Source(path, size_of(path), [segments], bio=True)


def mirror(lab: Lab, *serials: str) -> Source:
    run("modprobe", "raid1")
    path, paths = "/dev/md100", {disks.find(serial): serial for serial in serials}
    run(
        "mdadm", "--create", path, "--run", "--quiet", "--metadata=1.2", "--level=1",
        f"--raid-devices={len(paths)}", "--bitmap=none", "--assume-clean", *paths,
    )  # fmt: skip
    lab.stack.callback(run, "mdadm", "--stop", "--quiet", path)
    size = size_of(path)
    segments = []
    for lower, serial in paths.items():
        offset = Path(f"/sys/block/md100/md/dev-{Path(lower).name}/offset")
        at = int(offset.read_text(encoding="ascii")) * SECTOR
        segments.append([Segment(0, size, serial, at)])
    return Source(path, size, segments, bio=True)


STACKS: dict[str, Callable[[Lab], Source]] = {
    "virtio-blk": lambda lab: whole(lab, "blk"),
    "nvme-4096": lambda lab: whole(lab, "nvme4k"),
    "virtio-scsi-partition": lambda lab: partition(lab, "scsi"),
    "lvm-linear": lambda lab: linear(lab, "lv1", "lv2"),
    "md-raid1": lambda lab: mirror(lab, "md1", "md2"),
}


# Writers


class Turns:
    """Goes on until it is stopped, with pauses, and counts.

    How fast a round is depends on the machine: it is adapted so that a point takes a few rounds.
    """

    def __init__(self, seed: int, pause: float) -> None:
        self._random, self._pause = random.Random(seed), pause
        self.stop = threading.Event()
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        for self.done in itertools.count(1):
            yield self.done
            if self.stop.wait(self._random.expovariate(1 / self._pause)):
                return

    def go_on(self, count: int) -> None:
        """Wait for so many turns."""
        until = self.done + count
        wait_until(lambda: self.done >= until, f"{count} changes", 120)

    def adapt(self, rounds: int) -> None:
        if rounds == 1:
            self._pause *= 0.7
        elif rounds > 3:
            self._pause *= 2


class OwnMix(RawMix):
    """Changes within some bytes that are nobody else's, so that the order of two that meet is
    known. A part of them go over one of `edges`."""

    def __init__(self, path: str, seed: int, start: int, length: int, edges: Sequence[int]) -> None:
        super().__init__(path, seed)
        self._start, self.size = start, length
        self._edges = [edge - start for edge in edges if start < edge < start + length]
        # A page may change while it is written, and then the log may have it as it was before and
        # the image as it was after: what is written through the cache is made to end at once.
        del self.operations["mapped"]

    def place(self, unit: int, largest: int) -> tuple[int, int]:
        start, length = super().place(unit, min(largest, LARGEST))
        if self._edges and self.random.random() < 0.2:
            start = self.random.choice(self._edges) - length // 2
            start = min(max(start, 0), self.size - length) // unit * unit
        return self._start + start, length

    def buffered(self) -> None:
        super().buffered()
        despite_collisions(lambda: os.fsync(self._buffered))

    def asynchronous(self) -> None:
        """At once, but none over another."""
        whole, count = (self._start, self.size), self.random.randrange(2, 9)
        self.size = self.size // count // self.block * self.block
        rows, at = [], 0
        try:
            for number in range(count):
                self._start = whole[0] + number * self.size
                start, length = self.place(self.block, 128 * KIB)
                self._memory.array[at : at + length] = self.sectors_for(start, length)
                rows.append((start, length, at))
                at += length
        finally:
            self._start, self.size = whole
        table = np.array(rows, dtype=np.int64)
        assert (
            self._queue.move(self._direct, self._memory, table, write=True) == table[:, 1]
        ).all()


class FileWork:
    """A few files that are made durable again and again, written past the cache, replaced."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.folder = random.Random(seed), folder / f"work{seed}"
        self.folder.mkdir()

    def run(self, turns: Turns) -> None:
        for _ in turns:
            path = self.folder / str(self.random.randrange(6))
            try:
                self.random.choice([self.replace, self.append, self.direct, self.punch])(path)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                path.unlink()

    def data(self) -> bytes:
        return self.random.randbytes(int(2 ** self.random.uniform(0, 17)))

    def replace(self, path: Path) -> None:
        new = path.with_name("new")
        with new.open("wb") as file:
            file.write(self.data())
            os.fsync(file.fileno())
        new.replace(path)

    def append(self, path: Path) -> None:
        with path.open("ab") as file:
            file.write(self.data())
            file.flush()
            if file.tell() > 512 * KIB:
                file.truncate(0)
            os.fdatasync(file.fileno())

    def direct(self, path: Path) -> None:
        memory = linux.Buffer(32 * KIB)
        memory.array[:] = np.frombuffer(self.random.randbytes(32 * KIB), dtype=np.uint8)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            os.pwritev(fd, [memory.view], self.random.randrange(8) * 32 * KIB)
        finally:
            os.close(fd)

    def punch(self, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            linux.punch_hole(fd, self.random.randrange(64 * KIB), 64 * KIB)
        finally:
            os.close(fd)


# Points


class Point(NamedTuple):
    number: int
    consistency: str
    rounds: int
    changes: int  # that were made since the one before


class Taker:
    """Takes points of a source, and what is to be known of them."""

    def __init__(self, lab: Lab, source: Source) -> None:
        self.lab, self.source = lab, source
        self.replica = str(lab.name("replica"))
        self.points: list[Point] = []
        self.digests: list[NDArray[np.uint64]] = []
        self.tried = 0

    def take(self, wanted: int, turns: Sequence[Turns]) -> None:
        """While others write: some more turns of each for every point."""
        # The guard of a freeze takes seconds to start on an emulated processor.
        options = Options(freeze=False)
        until, limit = len(self.points) + wanted, self.tried + TRIES * wanted
        while len(self.points) < until and self.tried < limit:
            before = sum(each.done for each in turns)
            for each in turns:
                each.go_on(3)
            self.tried += 1
            mark(f"begin {self.tried}")
            path, lab = self.source.path, self.lab
            try:
                report = sync.sync(lab.store, path, self.replica, options, Silent())[0]
            except NoPoint:
                report = None
            mark(f"end {self.tried}")
            for each in turns:
                each.adapt(report.rounds if report else MOST)
            if report is None:
                continue
            assert report.mode in ("incremental", "nothing"), report
            self.digests.append(digests(read_image(self.replica)))
            during = sum(each.done for each in turns) - before
            self.points.append(Point(self.tried, report.consistency, report.rounds, during))


def mark(text: str) -> None:
    (TRACING / "trace_marker").write_text(text, encoding="ascii")


def raw(taker: Taker, seed: int) -> None:
    source = taker.source
    first = source.size * 3 // 8 // (64 * KIB) * (64 * KIB)
    regions = [(0, first), (first, source.size - first)]
    edges = [segment.start for segment in source.segments[0]]
    turns = [Turns(seed + number, 0.1) for number in range(len(regions))]
    mixes = [
        OwnMix(source.path, seed + number, *region, edges) for number, region in enumerate(regions)
    ]
    written(taker, RAW, turns, [mix.run for mix in mixes])
    flush(source.path)


def files(taker: Taker, seed: int) -> None:
    source = taker.source
    make_filesystem(source.path, "ext4")
    with taker.lab.mounted(source.path) as folder:
        turns = [Turns(seed + number, 0.1) for number in range(2)]
        works = [FileWork(folder, seed + number) for number in range(2)]
        written(taker, FILES, turns, [work.run for work in works])
    trim(taker.lab, source.path)
    flush(source.path)


def written(
    taker: Taker, wanted: int, turns: list[Turns], works: list[Callable[[Turns], None]]
) -> None:
    """Points while these work."""

    def take() -> None:
        try:
            taker.take(wanted, turns)
        finally:
            for each in turns:
                each.stop.set()

    pairs = zip(works, turns, strict=True)
    together([take, *(lambda work=work, turn=turn: work(turn) for work, turn in pairs)])


def points(lab: Lab, name: str, seed: int) -> None:
    source = STACKS[name](lab)
    (TRACING / "trace").write_text("", encoding="ascii")
    print(f"{name}, {time.monotonic():.1f}", flush=True)
    fill(source.path)
    taker = Taker(lab, source)
    lab.track(source.path)
    lab.sync(source.path, taker.replica)
    print(f"tracked, {time.monotonic():.1f}", flush=True)
    for phase in (raw, files):
        phase(taker, seed)
    share = Path(SHARE)
    shutil.copyfile(TRACING / "trace", share / f"{name}.trace")
    last = digests(read_image(source.path))
    np.save(share / f"{name}.npy", np.stack([*taker.digests, last]))
    overrun = (TRACING / "per_cpu/cpu0/stats").read_text(encoding="ascii")
    told = {
        "size": source.size,
        "segments": source.segments,
        "device": number(source.disk or source.path),
        "start": source.start,
        "bio": source.bio,
        "tried": taker.tried,
        "points": taker.points,
        "trace": overrun,
    }
    (share / f"{name}.json").write_text(json.dumps(told), encoding="ascii")


def main() -> None:
    seed = int(sys.argv[1])
    compile_once()
    (TRACING / "buffer_size_kb").write_text("24576", encoding="ascii")
    for event in EVENTS:
        (TRACING / f"events/block/block_{event}/enable").write_text("1", encoding="ascii")
    with pytest.MonkeyPatch.context() as patch, lab_in_memory(patch) as lab:
        for name in sys.argv[2:]:
            begin = time.monotonic()
            points(lab, name, seed)
            print(f"{name} done, {time.monotonic() - begin:.1f} s", flush=True)
        for state in lab.store.devices():
            lab.untrack(state.path)


if __name__ == "__main__":
    main()
