"""One sync round: drain, plan, copy, commit.

Locks are taken in this order: the replica, and with it the link, for the whole sync; the device for
the time of a swap. What was begun and not committed is finished by the next sync: see `state`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np

from blktrack import capture, crash, extent
from blktrack.errors import CopyFailed, Interrupted, NotTracked, ResyncNeeded
from blktrack.extent import ExtentArray
from blktrack.point import Point
from blktrack.report import SyncReport, VerifyReport
from blktrack.ship.copy import Copied, Mode, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.ship.target import Target
from blktrack.state import DeviceState, Doubt, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.status import resync_reason
from blktrack.tracker.tracker import find
from blktrack.tracker.tracking import Gap, Swap, Tracking
from blktrack.uevents import Watch
from blktrack.units import format_size


class Observer(Protocol):
    """Who watches a long operation."""

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` bytes begins."""

    def done(self, count: int) -> None:
        """So many bytes of the phase are dealt with."""


@dataclass
class Options:
    full: bool = False  # ship everything
    resync: str = ""  # compare everything, for this reason
    no_resync: bool = False
    force: bool = False
    limit: int | None = None  # bytes of the source read per second
    stop: threading.Event = field(default_factory=threading.Event)
    signum: int = 0  # set together with `stop`


@dataclass(frozen=True)
class Plan:
    """What one round has to do."""

    mode: str  # as in SyncReport
    reason: str
    swap: Swap
    extents: ExtentArray


def sync(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> tuple[SyncReport, Copied]:
    """Bring the replica at `target` to a point of the device at `path`."""
    begun = time.monotonic()
    state, device = find(store, path)
    known = _find_link(store, state.id, target)
    with Replica.open(
        target,
        source=device,
        link=known.id if known else None,
        paths=store.paths,
        force=options.force,
    ) as replica:
        # Read anew: whoever had the replica until now may have moved the cursor.
        link = _find_link(store, state.id, target) or _new_link(store, state.id, target, replica)
        current = _Round(store, device, state.id, link, replica, options)
        plan, sets = current.prepare()
        with sets, Watch(options.stop, device, replica.target.device, writable=True):
            observer.phase(plan.mode, extent.total(plan.extents))
            level, copied = current.ship(plan, sets, observer)
            _judge(plan.mode, copied, path, target, options)
            point = Point(plan.swap.epoch, plan.swap.generation, plan.swap.time, level)
            current.commit(point, sets)
    report = SyncReport(
        mode=plan.mode,
        reason=plan.reason,
        consistency=level,
        epoch=point.epoch,
        point=point.time,
        rounds=1 if len(plan.extents) else 0,
        extents=len(plan.extents),
        bytes_changed=extent.total(plan.extents),
        bytes_shipped=copied.bytes_written,
        bytes_zeroed=copied.bytes_zeroed,
        bytes_wire=0,
        freeze_s=0.0,
        duration_s=time.monotonic() - begun,
    )
    return report, copied


def _find_link(store: Store, number: str, target: str) -> LinkState | None:
    return next((link for link in store.links(number) if link.target == target), None)


def _new_link(store: Store, number: str, target: str, replica: Replica) -> LinkState:
    base = name = Path(target).name
    taken = {link.name for link in store.links(number)}
    number_of = count(2)
    while name in taken:
        name = f"{base}-{next(number_of)}"
    return LinkState(replica.link, name, target)


@dataclass
class _Round:
    """One round of one link. `number` is the device's id."""

    store: Store
    device: BlockDevice
    number: str
    link: LinkState
    replica: Replica
    options: Options

    def prepare(self) -> tuple[Plan, LinkSets]:
        """Close the epoch and decide what to ship. A gap begins a new generation here."""
        link = self.link
        with hold(self.store, self.number, self.device.path):
            state = self.store.device(self.number)
            if state is None or not state.wanted:
                raise NotTracked(f"{self.device.path} is no longer tracked")
            tracking, swap = self._drain(state)
            with tracking:
                self._catch_up(tracking.state)
                mode, reason = self._mode(tracking.state)
                resumed = (
                    link.phase == mode
                    and link.filled == tracking.state.generation
                    and self.replica.record is not None
                    and not self.replica.changed
                )
                sets = None
                try:
                    sets = LinkSets(tracking, link)
                except FileNotFoundError:
                    resumed = False
                    if mode == "incremental":
                        mode, reason = "resync", "its pending set is gone"
                if mode == "resync" and self.options.no_resync:
                    raise ResyncNeeded(
                        f"{link.target} needs a resync: {reason}", hint="run it without --no-resync"
                    )
                sets = sets or LinkSets(tracking, link, create=True)
                if mode == "incremental" or resumed:
                    extents = sets.take()
                else:
                    sets.fill()
                    extents = sets.extents()
                    link.phase, link.filled = mode, tracking.state.generation
                    link.reason = reason
                    if mode == "resync":
                        Doubt.add(link.doubts, link.filled, reason)
                    self.store.save_link(self.number, link)
                    crash.point("fill-recorded")
        if mode == "incremental" and not len(extents):
            mode = "nothing"
        return Plan(mode, reason, swap, extents), sets

    def _drain(self, state: DeviceState) -> tuple[Tracking, Swap]:
        """The tracking just after a swap; after a gap, that of a new generation."""
        with contextlib.ExitStack() as stack:
            try:
                tracking = stack.enter_context(open_tracking(self.store, state, self.device))
                swap = tracking.drain()
            except Gap as gap:
                if self.options.no_resync and self.link.cursor is not None:
                    raise ResyncNeeded(
                        f"tracking has a gap: {gap}", hint="run it without --no-resync"
                    ) from gap
            else:
                stack.pop_all()
                return tracking, swap
        state = generation.begin(self.store, self.device, state.granularity or None)
        tracking = Tracking(self.store, state, self.device)
        return tracking, tracking.drain()

    def _catch_up(self, state: DeviceState) -> None:
        """A death between the two commits leaves the replica ahead of the link: follow it."""
        link, record = self.link, self.replica.record
        if record is None or record.state is not State.READY or self.replica.changed:
            return
        point, cursor = record.point, link.cursor
        if point is None or point.generation != state.generation:
            return
        behind = cursor is None or cursor.generation != point.generation
        if behind or (cursor and cursor.epoch < point.epoch):
            link.cursor = point
            link.phase = link.filled = link.reason = ""
            self.store.save_link(self.number, link)

    def _mode(self, state: DeviceState) -> tuple[str, str]:
        """How to bring the replica up, and why if not the usual way."""
        record = self.replica.record
        if self.options.full:
            return "initial", "a full copy was asked for"
        if record is None:
            return "initial", "the replica is new" if self.link.cursor else ""
        if self.link.phase == "initial":
            return "initial", self.link.reason
        if self.options.resync:
            return "resync", self.options.resync
        if self.replica.changed:
            return "resync", f"the replica is not as it was left: {self.replica.changed}"
        if self.link.cursor is None:
            return "resync", "the replica was made by a link that is not known here"
        if reason := resync_reason(state, self.link):
            return "resync", reason
        if record.lacks(self.link.cursor):
            return "resync", "the replica is not at the point that it was brought to"
        return "incremental", ""

    def ship(self, plan: Plan, sets: LinkSets, observer: Observer) -> tuple[str, Copied]:
        """Copy the planned extents; the consistency of what was read, and what became of it."""
        level = "none"

        def read_done() -> None:
            nonlocal level
            level = capture.consistency(self.store, self.device, self.number, plan.swap)

        if not len(plan.extents):
            read_done()
            return level, Copied()
        between = State.APPLYING if plan.mode == "incremental" else State.UNFINISHED
        crash.point("ship-planned")
        self.replica.begin(between, plan.swap.generation)
        crash.point("ship-begun")
        with open_end(self.device.path) as source:
            copied = copy(
                source,
                self.replica.end,
                plan.extents,
                mode=Mode.REPAIR if plan.mode == "resync" else Mode.COPY,
                granularity=max(sets.granularity, 4096),
                progress=observer.done,
                checkpoint=sets.shipped,
                read_done=read_done,
                stop=self.options.stop,
                limit=self.options.limit,
                known_zero=self.replica.blank,
            )
        return level, copied

    def commit(self, point: Point, sets: LinkSets) -> None:
        """Replica first, then what the link no longer has to ship, then the link."""
        self.replica.commit(point)
        crash.point("commit-replica")
        sets.all_shipped()
        crash.point("commit-sets")
        self.link.cursor = point
        self.link.phase = self.link.filled = self.link.reason = ""
        self.store.save_link(self.number, self.link)
        crash.point("commit-link")


def _judge(mode: str, copied: Copied, path: str, target: str, options: Options) -> None:
    """An incomplete copy is no point: say what is missing. What was shipped stays shipped."""
    if len(copied.failed):
        places = extent.to_list(copied.failed)
        shown = ", ".join(str(place) for place in places[:4])
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        raise CopyFailed(
            f"{path} could not be read at {shown}{more} "
            f"({format_size(extent.total(copied.failed))})",
            hint="the rest was dealt with; these extents stay pending: check the disk, try again",
        )
    if copied.interrupted:
        raise Interrupted(
            f"{mode} of {path} and {target} was interrupted",
            signum=options.signum,
            hint="what was done is kept: run it again to go on from there",
        )


def verify(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> VerifyReport:
    """Compare every byte of the device with the replica; nothing is written."""
    device = BlockDevice.find(path)
    other = Target.find(target).device
    with (
        Watch(options.stop, device, other),
        open_end(device.path) as source,
        open_end(target) as replica,
    ):
        size = min(source.size, replica.size)
        observer.phase("verify", size)
        whole = extent.from_pairs([(0, size)])
        copied = copy(
            source,
            replica,
            whole,
            mode=Mode.COMPARE,
            progress=observer.done,
            stop=options.stop,
            limit=options.limit,
        )
        missing = extent.from_pairs([(size, source.size - size)])
        _judge("verify", copied, path, target, options)
    different = np.concatenate([copied.different, missing])
    return VerifyReport(
        bytes_compared=size,
        bytes_different=extent.total(different),
        bytes_repaired=0,
        extents=different.tolist(),
    )


def repair(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> VerifyReport:
    """Compare every byte and rewrite what differs: a resync, whose point the replica is then at."""
    options.resync = "repair was asked for"
    report, copied = sync(store, path, target, options, observer)
    different = extent.total(copied.different)
    return VerifyReport(
        bytes_compared=report.bytes_changed,
        bytes_different=different,
        bytes_repaired=different,
        extents=copied.different.tolist(),
    )
