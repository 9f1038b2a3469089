"""The machines that tests run in, and the kernels under them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from blktrack.units import MIB
from tests.blockdev import run
from tests.reached import GUEST
from tools.vm import kernels
from tools.vm.disk import Disk
from tools.vm.initramfs import ROOT_DISK

KERNELS = tuple(kernels.SUITES)
BRIEF = kernels.BRIEF
DELIBERATE = "BLKTRACK_DELIBERATE"  # set for tests that are meant to fail: test_harness.py
ALONE = "BLKTRACK_ALONE"  # the share of a test that was given a process of its own: run.py
INSIDE = GUEST in os.environ


@dataclass(frozen=True)
class Spec:
    """A disk, found inside by its serial number with `tests.vm.disks.find`."""

    serial: str
    kind: str = "virtio-blk"
    sector: int = 512
    size: int = 128 * MIB
    options: str = ""
    ext4: bool = False

    def make(self, folder: Path) -> Disk:
        image = folder / f"{self.serial}.img"
        disk = Disk(self.serial, image, self.kind, self.sector, options=self.options)
        disk.create(self.size)
        if self.ext4:
            run("mkfs.ext4", "-q", "-F", image)
        return disk


@dataclass(frozen=True)
class Layout:
    disks: tuple[Spec, ...] = ()
    memory: int = 1024  # MiB
    limit: float = 900.0  # seconds for all tests of one kernel, with the boot
    arguments: str = ""  # of the kernel


# All tests of a row on a kernel run in one machine, one after another, so a test that may take the
# machine with it or needs other disks has a row of its own.
MACHINES = {
    # What is written to / is on the first disk.
    "plain": Layout(
        disks=(
            Spec("root", ext4=True),
            Spec("blk"),
            Spec("scsi", "virtio-scsi"),
            Spec("nvme", "nvme"),
            Spec("nvme4k", "nvme", sector=4096),
        ),
        arguments=ROOT_DISK,
    ),
}
# Of its own, as it is long. A piece of memory is to be taken for persistent, for DAX.
MACHINES["stacks"] = Layout(
    (
        *(replace(spec, size=12 * MIB) for spec in MACHINES["plain"].disks if not spec.ext4),
        Spec("head", "nvme-shared", size=12 * MIB),
    ),
    memory=1280,
    limit=2400.0,
    arguments="memmap=64M!1024M",
)
# Of its own, as a device that stays suspended takes its machine with it.
MACHINES["inflight"] = Layout()
