"""What cannot be tracked soundly."""

from __future__ import annotations

from pathlib import Path

from tests.blockdev import Lab, wait_until
from tests.vm import disks
from tests.vm.guest.stacks.disks import null_blk
from tests.vm.guest.stacks.registry import Made, stack


@stack("null_blk-zoned", refused="zoned device")
def _zoned(lab: Lab, size: int) -> Made:
    return [null_blk(lab, size, zoned=1, zone_size=4)]


@stack("pmem", modules="nd_e820 nd_pmem", refused="DAX mappings")
def _pmem(lab: Lab, size: int) -> Made:
    """Memory that the kernel was told to take for persistent: tests/vm/machines.py."""
    wait_until(lambda: Path("/dev/pmem0").exists(), "/dev/pmem0")
    return ["/dev/pmem0"]


@stack("nvme-multipath-head", refused="NVMe multipath head")
def _head(lab: Lab, size: int) -> Made:
    return [disks.find("head")]
