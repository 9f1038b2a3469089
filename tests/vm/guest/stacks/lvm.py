"""Logical volumes, of a group of loop devices."""

from __future__ import annotations

from blktrack.units import MIB
from tests.blockdev import Lab, run
from tests.vm.guest.stacks.registry import Made, stack


def group(lab: Lab, *volumes: str) -> str:
    run("vgcreate", "-q", "stackvg", *volumes)
    lab.stack.callback(run, "vgremove", "-q", "-f", "-y", "stackvg")
    return "stackvg"


def logical(lab: Lab, size: int, *options: str, parts: int = 3, each: int = 0) -> Made:
    """A volume of a group of loop devices that are too small to hold it alone."""
    each = each or size // 2 + 8 * MIB
    name = group(lab, *(lab.loop(each) for _ in range(parts)))
    run("lvcreate", "-q", "-y", "-W", "n", "-n", "lv", "-L", f"{size}b", *options, name)
    return ["/dev/mapper/stackvg-lv"]


stack("lvm-linear", modules="dm-mod", tools="lvm")(logical)
stack("lvm-striped", modules="dm-mod", tools="lvm")(
    lambda lab, size: logical(lab, size, "-i", "2", "-I", "64k")
)
stack("lvm-raid1", modules="dm-raid raid1", tools="lvm")(
    lambda lab, size: logical(
        lab, size, "--type", "raid1", "-m", "1", parts=2, each=size + 16 * MIB
    )
)


@stack("lvm-snapshot", modules="dm-snapshot", tools="lvm")
def _snapshot(lab: Lab, size: int) -> Made:
    """The origin of a snapshot, which holds all of it."""
    made = logical(lab, size, each=size + 16 * MIB)
    extents = f"{size + 8 * MIB}b"
    run("lvcreate", "-q", "-y", "-s", "-n", "snap", "-L", extents, "stackvg/lv")
    return made


def thin(lab: Lab, size: int) -> Made:
    name = group(lab, lab.loop(3 * size))
    pool = ["-T", "-L", f"{2 * size}b", "--poolmetadatasize", "4m", "--chunksize", "64k"]
    run("lvcreate", "-q", "-y", *pool, f"{name}/pool")
    run("lvcreate", "-q", "-y", "-T", "-V", f"{size}b", "-n", "lv", f"{name}/pool")
    return ["/dev/mapper/stackvg-lv"]


stack("lvm-thin", modules="dm-thin-pool", tools="lvm")(thin)


@stack("lvm-thin-snapshot", modules="dm-thin-pool", tools="lvm")
def _thin_snapshot(lab: Lab, size: int) -> Made:
    made = thin(lab, size)
    run("lvcreate", "-q", "-y", "-s", "-n", "snap", "stackvg/lv")
    return made
