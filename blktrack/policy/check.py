"""A policy held against this host: what would fail now, or after the next boot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from blktrack import device
from blktrack.errors import BlktrackError
from blktrack.policy.model import DevicePolicy, LinkPolicy, Policy, same_device
from blktrack.policy.read import Problem
from blktrack.ship import ssh, target
from blktrack.ship.address import is_remote
from blktrack.sysfs import BlockDevice

# What the kernel numbers in the order in which it finds it.
_NUMBERED = re.compile(
    r"/dev/((s|v|h|xv)d[a-z]+\d*|(nvme|mmcblk|loop|dm-|zram|nbd|ram|md|rbd)\d.*)"
)
_STABLE = ("by-id", "by-partuuid", "by-uuid", "by-path")  # folders of /dev/disk, the best first


def check(policy: Policy) -> list[Problem]:
    """Problems that are no fault of the file by itself."""
    if not policy.devices:
        return [Problem("", "names no device", "add [device.NAME] with a path and a replica")]
    return [*_same(policy), *(found for entry in policy.devices for found in _device(entry))]


def _same(policy: Policy) -> Iterator[Problem]:
    for one, other in combinations(policy.devices, 2):
        if same_device(one.path, other.path):
            hint = "put all replicas of a device into one table"
            yield Problem(f"device.{other.name}.path", f"is the device of device.{one.name}", hint)


def _device(entry: DevicePolicy) -> Iterator[Problem]:
    key = f"device.{entry.name}"
    if _NUMBERED.fullmatch(entry.path) and not Path(entry.path).is_symlink():
        better = stable_name(entry.path)
        hint = f"write {better}" if better else "use a name that stays, as below /dev/disk/by-id"
        yield Problem(f"{key}.path", f"{entry.path} may be another disk after a boot", hint)
    try:
        source = device.source(entry.path)
    except BlktrackError as error:
        yield Problem(f"{key}.path", str(error), error.hint or "attach the device")
        return
    for link in entry.links:
        yield from _link(f"{key}.replica.{link.name}", link, source)


def _link(key: str, link: LinkPolicy, source: BlockDevice) -> Iterator[Problem]:
    if not link.enabled:
        return
    try:
        if is_remote(link.target):
            ssh.check()  # of what is there nothing is known here
        else:
            target.check(target.Target.find(link.target), source)
    except BlktrackError as error:
        yield Problem(f"{key}.target", str(error), error.hint)


def stable_name(path: str) -> str:
    """A name of this device that it has after a boot too; "" if there is none."""
    real = Path(path).resolve()
    for folder in _STABLE:
        names = Path("/dev/disk", folder)
        for entry in sorted(names.iterdir()) if names.is_dir() else []:
            if entry.resolve() == real:
                return str(entry)
    return ""
