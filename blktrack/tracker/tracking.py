"""A tracked device, open: draining its maps into the pending sets of its links.

Open it under the device's lock (`opening.hold`), which is never held for longer than a swap takes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

import numpy as np

from blktrack import crash, mapper
from blktrack.bitmap import Words
from blktrack.bpf import abi
from blktrack.bpf.kernel import Detached, Kernel
from blktrack.bpf.programs import BY_KIND, Program
from blktrack.errors import BlktrackError
from blktrack.state import DeviceState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import account, doubt
from blktrack.tracker.absorb import absorb
from blktrack.tracker.account import Account
from blktrack.tracker.generation import end, window_of

# Seconds that a task may be kept from the next copy of a program, or from the kernel's own count,
# before what it has to catch or to count there is taken as missed.
_CATCHING = 0.2
BEGIN_ANEW = "run blktrack sync: it begins anew and resyncs the replica"


class Gap(BlktrackError):
    """The generation is over: its reason is recorded, and a new one has to begin."""

    exit_code = 3


@dataclass(frozen=True)
class Swap:
    """The instant at which an epoch closed: the candidate for a point."""

    generation: str
    epoch: int
    time: float
    missed: int  # by then, by the program that sees changes begin


class Tracking:
    """Pins, planes and pending sets of one device. Gap if they cannot be trusted any more."""

    def __init__(self, store: Store, state: DeviceState, device: BlockDevice) -> None:
        self.store, self.state, self.device = store, state, device
        self.window = window_of(device, state.size, state.granularity or 4096)
        self.bio = self.window.kind == abi.KIND_BIO
        self.kernel: Kernel | None = None
        if state.resting:
            raise Gap(f"{device.path} is stopped", hint="run blktrack start")
        reason = None if state.generation else self._last_reason()
        reason = reason or doubt.of_identity(state, device)
        epoch = store.epoch(state.id)
        if reason is None and (epoch is None or epoch.generation != state.generation):
            reason = f"its state in {store.run(state.id)} is gone"
        if reason is None:
            assert epoch is not None
            self.epoch = epoch
            try:
                reason = self._open()
            except Detached as error:
                reason = str(error)
            except BlktrackError:
                self.close()
                raise
        if reason is not None:
            self.close()
            self._end(reason)

    def _last_reason(self) -> str:
        return self.state.doubts[-1].reason if self.state.doubts else "tracking never began"

    def _end(self, reason: str) -> None:
        if self.state.generation:
            end(self.store, self.state, reason)
        raise Gap(
            f"{self.device.path}: {reason}",
            hint=BEGIN_ANEW,
        )

    def _open(self) -> str | None:
        """Why it is of no use: it is another's, or something went unseen by now, as far as that is
        told without a swap."""
        self.kernel = Kernel(self.store.paths.pins)
        submit, complete = self.program_pair()
        if reason := doubt.of_window(self.state, self.kernel, set(self.state.maps)):
            return reason
        self.active, self.retired = self.kernel.planes(self.state.slot, self.window.geometry)
        return (
            doubt.of_window(self.state, self.kernel, {self.active.id, self.retired.id})
            or doubt.of_counters(self.kernel.stats(self.state.slot), growing=self.grown)
            or doubt.of_misses(self.epoch, submit, complete, bio=self.bio)
            or doubt.of_table(self.epoch.table, mapper.table(self.device))
        )

    @property
    def words(self) -> int:
        """Words of a bitmap of this device's granules."""
        return self.window.geometry.levels[0]

    @property
    def grown(self) -> bool:
        """Whether the device is larger than what is tracked of it."""
        return self.device.size > self.state.size

    def drain(self) -> Swap:
        """Close the epoch: from here on, changes belong to the next one. Gap if marks were lost."""
        assert self.kernel
        if not self.epoch.clear:
            self._absorb()
        self.epoch.clear = False
        self.store.save_epoch(self.state.id, self.epoch)
        crash.point("drain-announced")
        # Read before the swap: what is missed from here on counts for the next epoch too.
        submit, complete = self.program_pair()
        before = self.counts()
        at = time.time()  # what completed before belongs to the epoch; the swap takes a moment
        self.kernel.swap(self.state.slot, self.retired)
        crash.point("drain-swapped")
        self.active, self.retired = self.retired, self.active
        self._absorb()
        self.epoch.number += 1
        self.epoch.submit_missed = submit.missed
        self.epoch.complete_missed = complete.missed
        known = account.known(self.epoch, self.state.slot)
        if known and before and before.exact:
            known = known.at_least(unended=before.unended)
        account.remember(self.epoch, self.state.slot, known)
        self.store.save_epoch(self.state.id, self.epoch)
        crash.point("drain-recorded")
        return Swap(self.state.generation, self.epoch.number, at, submit.missed)

    def _absorb(self) -> None:
        if reason := absorb(self):
            self._end(reason)
        self.epoch.clear = True

    def counts(self) -> Account | None:
        """The programs' counts against the kernel's; None if it keeps none."""
        assert self.kernel
        known = account.known(self.epoch, self.state.slot)
        if known is None or not account.available(self.device):
            return None
        until = time.monotonic() + _CATCHING
        while True:
            now = account.take(self.device, self.kernel.stats_reader(self.state.slot))
            # A processor may be held between the program and the kernel's count of the same end.
            behind = now.exact and now.unended < known.unended
            if not behind or time.monotonic() > until:
                return now
            time.sleep(0.001)

    def program_pair(self) -> tuple[Program, Program]:
        """The submission and the completion program as they are now. Gap if they are others."""
        assert self.kernel
        until = time.monotonic() + _CATCHING
        while True:
            programs = self.kernel.programs(self.window.kind)
            if reason := doubt.of_programs(self.state, programs):
                self._end(reason)
            submit, complete = (programs[name] for name in BY_KIND[self.window.kind])
            missed = submit.missed_since(self.epoch.submit_missed)
            if not missed or len(submit.links) == 1 or time.monotonic() > until:
                return submit, complete
            time.sleep(0.001)

    def seen_since(self, swap: Swap) -> bool:
        """Whether no change since then began unseen, as far as the kernel counts what ends."""
        known = account.known(self.epoch, self.state.slot)
        unseen = doubt.of_account(known, self.counts(), bio=self.bio)
        return not self.program_pair()[0].missed_since(swap.missed) and not unseen

    def submitted(self) -> Words:
        """Granules to which changes were submitted since the last drain."""
        found: Words = np.zeros(self.words, dtype=np.uint64)
        for planes in (self.active, self.retired):
            for number in (abi.SUBMITTED, abi.COMPLETED):
                planes.merge_into(number, found)
        return found

    def quiet_since_swap(self) -> bool:
        """True if no change was submitted since the last drain, and none could have gone unseen."""
        assert self.kernel
        submit, _ = self.program_pair()
        return (
            not self.active.any_set(abi.SUBMITTED)
            and not submit.missed_since(self.epoch.submit_missed)
            and doubt.of_counters(self.kernel.stats(self.state.slot)) is None
        )

    def live(self) -> Words:
        """Granules changed since the last drain, without a swap: what the maps hold now."""
        found: Words = np.zeros(self.words, dtype=np.uint64)
        self.active.merge_into(abi.COMPLETED, found)
        self.retired.merge_into(abi.COMPLETED, found)
        return found

    def counters(self) -> dict[str, int]:
        assert self.kernel
        return self.kernel.stats(self.state.slot)

    def close(self) -> None:
        if self.kernel:
            self.kernel.close()
            self.kernel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
