"""The programs' count of bytes against the kernel's own: completions that no program saw.

A kernel may run a tracepoint and not the program on it, and not count that either. So each drain of
a request-based disk compares what its programs saw end with the sectors written and discarded of
/sys/block/DISK/stat (Documentation/block/stat.rst). Both count each part of a request where it
ends, the program first (blk_update_request), so the kernel is ahead only if a program did not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from blktrack.bpf.planes import Reading
from blktrack.state import Epoch
from blktrack.sysfs import BlockDevice
from blktrack.units import SECTOR

_TRIES, _ENOUGH = 400, 3


@dataclass(frozen=True)
class Account:
    """Bytes by which the kernel's count is ahead of the programs' of begun and ended changes.

    Only growth means something: the kernel began to count earlier. Each is at most the truth, and
    `exact` tells that for `unended` it is the truth: no completion came during some of the looks.
    """

    unbegun: int
    unended: int
    exact: bool = False

    def at_least(self, *, unbegun: int | None = None, unended: int | None = None) -> Account:
        """With either raised to what is known by now."""
        return replace(
            self,
            unbegun=max(self.unbegun, self.unbegun if unbegun is None else unbegun),
            unended=max(self.unended, self.unended if unended is None else unended),
        )


def available(device: BlockDevice) -> bool:
    """Whether the kernel counts what is written to it; drivers of bios count regardless."""
    return device.request_based and device.queue_number("iostats") == 1


def known(epoch: Epoch, slot: int) -> Account | None:
    """What is accounted for when the slot's counters began; None for a bio-based device."""
    pair = epoch.accounts.get(str(slot))
    return Account(pair[0], pair[1]) if pair else None


def remember(epoch: Epoch, slot: int, account: Account | None) -> None:
    """For the next drain; a slot's counters go on until it is given up."""
    if account:
        epoch.accounts[str(slot)] = [account.unbegun, account.unended]


def take(device: BlockDevice, stats: Callable[[], Reading]) -> Account:
    """Look between two looks at the programs' counters, decoded when time is no matter."""
    fd = os.open(device.disk.sys / "stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        begun, ended, quiet = -(1 << 62), -(1 << 62), 0
        for _ in range(_TRIES):
            before, raw, after = stats(), os.pread(fd, 4096, 0), stats()
            fields = [int(word) for word in raw.split()]
            theirs = (fields[6] + (fields[13] if len(fields) > 13 else 0)) * SECTOR
            first, last = before(), after()
            begun = max(begun, theirs - last["begun"])
            ended = max(ended, theirs - last["ended"])
            quiet += first["ended"] == last["ended"]
            if quiet >= _ENOUGH:
                break
        return Account(begun, ended, exact=quiet >= _ENOUGH)
    finally:
        os.close(fd)
