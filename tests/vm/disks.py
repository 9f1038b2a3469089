"""Disks of a machine, seen from inside: their names change from boot to boot."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from blktrack import linux
from blktrack.units import SECTOR
from tests.blockdev import Lab, run, wait_until


def find(serial: str) -> str:
    """The path of the disk with this serial number, once its driver has found it."""
    found: list[str] = []

    def met() -> bool:
        found[:] = [f"/dev/{path.name}" for path in Path("/sys/block").iterdir() if is_(path)]
        return bool(found) and Path(found[0]).exists()

    def is_(path: Path) -> bool:
        return serial in serials(path) and (path / "hidden").read_text().strip() == "0"

    wait_until(met, f"the disk {serial}")
    return found[0]


def serials(disk: Path) -> list[str]:
    """What the driver of a /sys/block/NAME says: virtio-blk, NVMe or SCSI."""
    said = []
    for name in ("serial", "device/serial", "device/vpd_pg80"):
        try:
            page = (disk / name).read_bytes()
        except OSError:
            continue
        # SPC-4, 7.8.13: four bytes come before the serial number of a SCSI disk.
        said.append((page[4:] if name.endswith("vpd_pg80") else page).decode("latin-1").strip())
    return said


def size_of(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return linux.device_size(fd)
    finally:
        os.close(fd)


def part(lab: Lab, disk: str, number: int, start: int, length: int) -> str:
    """A partition, in bytes, that goes with the lab."""
    run("addpart", disk, str(number), str(start // SECTOR), str(length // SECTOR))
    lab.stack.callback(until_done, "delpart", disk, str(number))
    node = f"{disk}p{number}" if disk[-1].isdigit() else f"{disk}{number}"
    wait_until(Path(node).exists, node)
    return node


def until_done(*command: str) -> None:
    """What is refused while a late close or a late request is under way."""

    def met() -> bool:
        with contextlib.suppress(Exception):
            run(*command)
            return True
        return False

    wait_until(met, " ".join(command))
