"""Which devices can be a source, and what tells one from another."""

from __future__ import annotations

import hashlib
import os
import re

from blktrack.errors import Refused
from blktrack.sysfs import BlockDevice


def source(path: str) -> BlockDevice:
    """The block device at `path`, if its changes can be seen soundly; else Refused."""
    device = BlockDevice.find(path)
    check(device)
    return device


def check(device: BlockDevice) -> None:
    """Refused for a device whose changes could pass unseen."""
    path, disk = device.path, device.disk
    if device.size == 0:
        raise Refused(f"{path} has no medium", hint="attach or configure it first")
    zoned = device.queue("zoned")
    if zoned not in (None, "none"):
        raise Refused(
            f"{path} is a {zoned} zoned device, on which a write's place is known only afterwards",
            hint="track a conventional device on top of it, such as a dm-zoned volume",
        )
    if device.queue_number("dax"):
        raise Refused(
            f"{path} can be written through DAX mappings, which never reach the block layer",
            hint="track a device without DAX, such as a dm-linear volume made with dax disabled",
        )
    if "nvme-subsystem" in disk.sys.parts:
        raise Refused(
            f"{path} is an NVMe multipath head, whose completions the kernel does not show",
            hint="boot with nvme_core.multipath=N, or track a dm-multipath volume instead",
        )


def device_id(device: BlockDevice) -> str:
    """Names a device's state: the same after a reboot where it has a permanent name."""
    name = device.permanent_name
    digest = hashlib.sha256(os.fsencode(name or f"name:{device.name}")).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-")
    return digest if name else f"{label}-{digest}"


def bypasses_bios(device: BlockDevice) -> bool:
    """Drivers that could do a page without a bio while the kernel had `rw_page`."""
    return device.disk.name.startswith(("zram", "ram", "pmem", "btt"))
