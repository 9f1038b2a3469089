"""Disks of a machine, seen from inside: their names change from boot to boot."""

from __future__ import annotations

from pathlib import Path

from tests.blockdev import wait_until


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
