"""Inside a machine: sources whose disks have a write log, and where their sectors lie there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blktrack.units import SECTOR
from tests.blockdev import Lab, run
from tests.vm import disks
from tests.vm.instants import Segment


@dataclass(frozen=True)
class Source:
    path: str
    size: int
    segments: list[list[Segment]]  # all of it; once for each mirror
    start: int = 0  # of a partition
    disk: str = ""  # whose partition it is
    bio: bool = False


def number(path: str) -> tuple[int, int]:
    found = os.stat(path).st_rdev
    return os.major(found), os.minor(found)


def whole(lab: Lab, serial: str) -> Source:
    path = disks.find(serial)
    size = disks.size_of(path)
    return Source(path, size, [[Segment(0, size, serial, 0)]])


def partition(lab: Lab, serial: str) -> Source:
    """Of odd edges."""
    disk = disks.find(serial)
    start = 63 * SECTOR
    size = disks.size_of(disk) - start - 17 * SECTOR
    path = disks.part(lab, disk, 1, start, size)
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
    return Source(path, disks.size_of(path), [segments], bio=True)


def mirror(lab: Lab, *serials: str) -> Source:
    run("modprobe", "raid1")
    path, paths = "/dev/md100", {disks.find(serial): serial for serial in serials}
    run(
        "mdadm", "--create", path, "--run", "--quiet", "--metadata=1.2", "--level=1",
        f"--raid-devices={len(paths)}", "--bitmap=none", "--assume-clean", *paths,
    )  # fmt: skip
    lab.stack.callback(run, "mdadm", "--stop", "--quiet", path)
    size = disks.size_of(path)
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
