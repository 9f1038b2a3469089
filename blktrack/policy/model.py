"""What a policy says, with everything that it leaves open filled in."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blktrack.history import KEEP
from blktrack.options import Options
from blktrack.quiesce.freeze import CAP
from blktrack.rates import UNLIMITED, Rates
from blktrack.ship.address import is_remote
from blktrack.ship.wire.pace import Setting

JOBS = 4  # devices that are synced at the same time
_ASKED = Options()  # of what nothing is said


@dataclass(frozen=True)
class LinkPolicy:
    """One replica of one device. Times are seconds."""

    name: str  # its key in the file
    device: str  # path, as the file has it
    target: str
    enabled: bool = True
    consistency: str = "crash"
    freeze: bool = True
    freeze_cap: float = CAP
    pre_freeze: tuple[str, ...] = ()
    post_freeze: tuple[str, ...] = ()
    in_place: bool = False
    time_limit: float | None = None
    # Of a replica on another host:
    retry_for: float = _ASKED.retry_for
    compress: Setting = _ASKED.compress
    peer_timeout: float = _ASKED.patience
    rates: Rates = UNLIMITED
    history: float = KEEP  # for which runs are remembered
    rpo: float | None = None  # the promised age of the newest point
    rpo_warning: float | None = None  # from this age on it is late
    rpo_error: float | None = None  # and from this one the promise is broken

    def options(self) -> Options:
        """What a sync of this link is asked for."""
        return Options(
            consistency=self.consistency,
            freeze=self.freeze,
            cap=self.freeze_cap,
            pre=self.pre_freeze,
            post=self.post_freeze,
            in_place=self.in_place,
            time_limit=self.time_limit,
            retry_for=self.retry_for,
            compress=self.compress,
            patience=self.peer_timeout,
            limit=self.rates,
            history=self.history,
        )

    def lateness(self, lag: float | None) -> str:
        """`ok`, `late` or `broken`, by the age in seconds of the newest point; "" where nothing is
        promised. Without a point a promise is broken."""
        if self.rpo_warning is None or self.rpo_error is None:
            return ""
        if lag is None or lag >= self.rpo_error:
            return "broken"
        return "late" if lag >= self.rpo_warning else "ok"


@dataclass(frozen=True)
class DevicePolicy:
    """A device and its replicas."""

    name: str  # its key in the file
    path: str
    granularity: int | None = None  # bytes, for when tracking begins
    links: tuple[LinkPolicy, ...] = ()


@dataclass(frozen=True)
class Policy:
    """A whole file; an empty one where there is no file."""

    path: Path
    devices: tuple[DevicePolicy, ...] = ()
    jobs: int = JOBS
    exists: bool = True

    @property
    def links(self) -> Iterator[LinkPolicy]:
        """Those of all devices, also the disabled ones, in the order of the file."""
        for device in self.devices:
            yield from device.links

    def link(self, device: str, target: str) -> LinkPolicy | None:
        """That of a replica of a device, whatever names either is called by."""
        name = target if is_remote(target) else os.path.abspath(target)
        found = (link for link in self.links if link.target == name)
        return next((link for link in found if same_device(link.device, device)), None)


def same_device(one: str, other: str) -> bool:
    """Whether two paths lead to one block device now; by name where one of them is away."""
    try:
        a, b = os.stat(one), os.stat(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
    if stat.S_ISBLK(a.st_mode) and stat.S_ISBLK(b.st_mode):
        return a.st_rdev == b.st_rdev
    return os.path.realpath(one) == os.path.realpath(other)
