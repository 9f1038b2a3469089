"""Inside a machine: `crash` points of sources on logged disks, while they are written to.

    python -m tests.vm.taker SEED STACK...

For each stack the share gets NAME.trace, what the kernel saw; NAME.npy, the digests of the sectors
of each point and, in the last row, of the source in the end; NAME.json, where its sectors lie on
the logged disks.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blktrack import sync
from blktrack.errors import NoPoint
from blktrack.options import Options
from blktrack.units import KIB
from tests.blockdev import (
    Lab,
    Silent,
    flush,
    lab_in_memory,
    read_image,
)
from tests.oracle import fill
from tests.vm.changes import MOST, FileWork, OwnMix, Turns
from tests.vm.compiled import compile_once
from tests.vm.sources import STACKS, Source, number
from tests.vm.writelog import digests
from tests.workload import make_filesystem, together, trim
from tools.vm.initramfs import SHARE

RAW, FILES = 7, 5  # points of each stack: of the bare device, of a file system
TRIES = 4  # for each of them
TRACING = Path("/sys/kernel/tracing")
EVENTS = ("rq_issue", "rq_requeue", "rq_complete", "bio_queue", "bio_complete")


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
    with lab_in_memory(os.environ.__setitem__) as lab:
        for name in sys.argv[2:]:
            begin = time.monotonic()
            points(lab, name, seed)
            print(f"{name} done, {time.monotonic() - begin:.1f} s", flush=True)
        for state in lab.store.devices():
            lab.untrack(state.path)


if __name__ == "__main__":
    main()
