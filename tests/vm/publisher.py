"""Inside a machine: replicas on logged disks are brought from point to point.

    python -m tests.vm.publisher SEED

Each disk has a partition and, behind it, a sector to which the number of a point is written, past
all caches, when its sync has reported success: so the log knows. The share gets the digests of the
sectors of every point, told.json says where things lie.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blktrack import sync
from blktrack.options import Options
from blktrack.ship.place import folder_of
from blktrack.ship.target import Target
from blktrack.units import KIB, MIB, SECTOR
from tests import sectors
from tests.blockdev import (
    Lab,
    Silent,
    flush,
    lab_in_memory,
    read_image,
    run,
    write_direct,
)
from tests.oracle import fill
from tests.vm import disks
from tests.vm.compiled import compile_once
from tests.vm.writelog import digests
from tests.workload import next_sequence
from tools.vm.initramfs import SHARE

POINTS = 6  # after the first copy
START, END = MIB, MIB  # bytes of a disk before the first partition and behind the last
STATE = 24 * MIB  # of the disk whose second partition is a replica
CASES = ("ext4", "xfs", "device")
MARK = 0x6D61_726B_2070_6F69


class Told(NamedTuple):
    epochs: list[int]  # of the points
    folder: str  # of the state of the replica, in the file system of the disk


def parts(case: str, size: int) -> list[tuple[int, int]]:
    """Start and length of the partitions of a disk: for a file system, and for a replica."""
    if case != "device":
        return [(START, size - START - END)]
    first = START + STATE
    return [(START, STATE), (first, size - first - END)]


def parted(lab: Lab, case: str) -> tuple[str, list[str]]:
    disk = disks.find(case)
    size = disks.size_of(disk)
    return disk, [
        disks.part(lab, disk, number, *each) for number, each in enumerate(parts(case, size), 1)
    ]


def mount(lab: Lab, kind: str, device: str, point: Path) -> Path:
    run(f"mkfs.{kind}", "-q", device)
    point.mkdir()
    run("mount", device, point)
    lab.stack.callback(run, "umount", point)
    return point


def change(source: str, size: int, turns: random.Random) -> None:
    for _ in range(turns.randrange(3, 12)):
        length = turns.randrange(1, 65) * 4 * KIB
        start = turns.randrange((size - length) // SECTOR) * SECTOR
        write_direct(source, start, sectors.make(start, length, next_sequence()))
    flush(source)


def main() -> None:
    seed = int(sys.argv[1])
    compile_once()
    turns, share, source = random.Random(seed), Path(SHARE), disks.find("src")
    told: dict[str, Told] = {}
    with lab_in_memory(os.environ.__setitem__) as lab:
        made = {case: parted(lab, case) for case in CASES}
        root = mount(lab, "ext4", made["device"][1][0], Path(os.environ["BLKTRACK_ROOT"]))
        targets = {
            case: str(mount(lab, case, made[case][1][0], lab.name(case)) / "replica.img")
            for case in ("ext4", "xfs")
        }
        targets["device"] = made["device"][1][1]
        size = disks.size_of(source)
        fill(source)
        lab.track(source)
        for number in range(POINTS + 1):
            change(source, size, turns)
            for case, target in targets.items():
                report = sync.sync(lab.store, source, target, Options(), Silent())[0]
                assert report.consistency == "crash", report
                last = disks.size_of(made[case][0]) - END
                mark = np.zeros(512, dtype=np.uint64)  # a block of 4 KiB
                mark[:2] = MARK, number
                write_direct(made[case][0], last, mark.tobytes())
                found = digests(read_image(target)[:size])
                np.save(share / f"{case}-{number}.npy", found)
                folder = folder_of(Target.find(target), lab.store.paths)
                base = root if case == "device" else folder.parent
                about = told.setdefault(case, Told([], os.path.relpath(folder, base)))
                about.epochs.append(report.epoch)
            print(f"point {number}", flush=True)
        (share / "told.json").write_text(json.dumps(told), encoding="ascii")
        lab.untrack(source)


if __name__ == "__main__":
    main()
