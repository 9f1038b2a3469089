"""One sync round of one link: drain, plan, copy, commit.

The device's lock is held for the time of a swap only. What was begun and not committed is finished
by the next round: see `state`.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import Protocol

from blktrack import capture, crash
from blktrack.errors import NotTracked, ResyncNeeded
from blktrack.extent import ExtentArray
from blktrack.point import Point
from blktrack.ship.copy import Copied, Mode, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.state import DeviceState, Doubt, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.status import resync_reason
from blktrack.tracker.tracking import Gap, Swap, Tracking


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


@dataclass
class Round:
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
                    and self.replica.existing_state is State.UNFINISHED
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
                if sets is None:
                    # Known before it has sets: none are left behind that nobody looks at.
                    self.store.save_link(self.number, link)
                    sets = LinkSets(tracking, link, create=True)
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
        if self.link.phase == "incremental" and record.state is State.READY:
            return "resync", "the replica went back to a point that a sync had begun to leave"
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
                checkpoint=lambda done: self._shipped(plan, sets, done),
                read_done=read_done,
                stop=self.options.stop,
                limit=self.options.limit,
                known_zero=self.replica.blank,
            )
        return level, copied

    def _shipped(self, plan: Plan, sets: LinkSets, done: ExtentArray) -> None:
        """These are durable on the replica, which from here on must not be found at its old point:
        the link notes so before it forgets them."""
        if plan.mode == "incremental" and self.link.phase != "incremental":
            self.link.phase = "incremental"
            self.store.save_link(self.number, self.link)
            crash.point("ship-noted")
        sets.shipped(done)

    def commit(self, point: Point, sets: LinkSets) -> None:
        """Replica first, then the link, then what the link no longer has to ship."""
        self.replica.commit(point)
        crash.point("commit-replica")
        self.link.cursor = point
        self.link.phase = self.link.filled = self.link.reason = ""
        self.store.save_link(self.number, self.link)
        crash.point("commit-link")
        sets.all_shipped()
        crash.point("commit-sets")
