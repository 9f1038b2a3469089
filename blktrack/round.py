"""One sync round of one link: drain, plan, copy, commit.

The device's lock is held for the time of a swap only. What was begun and not committed is finished
by the next round: see `state`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from blktrack import crash, extent
from blktrack.capture import Source, capture
from blktrack.errors import (
    CopyFailed,
    Interrupted,
    NoPoint,
    NotTracked,
    Refused,
    ResyncNeeded,
)
from blktrack.extent import ExtentArray
from blktrack.point import Point
from blktrack.quiesce.find import file_systems
from blktrack.quiesce.freeze import CAP, Freeze
from blktrack.ship.copy import Copied, Mode, copy
from blktrack.ship.endpoint import Endpoint, open_end
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.ship.room import room
from blktrack.state import DeviceState, Doubt, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.status import resync_reason
from blktrack.tracker.tracking import Gap, Swap, Tracking
from blktrack.units import format_size


class Observer(Protocol):
    """Who watches a long operation."""

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` bytes begins."""

    def done(self, count: int) -> None:
        """So many bytes of the phase are dealt with."""

    def warn(self, message: str) -> None:
        """Something went wrong that the operator has to see to, and the point is good."""


@dataclass
class Options:
    full: bool = False  # ship everything
    resync: str = ""  # compare everything, for this reason
    no_resync: bool = False
    force: bool = False
    limit: int | None = None  # bytes of the source read per second
    consistency: str = "crash"  # or none, or filesystem: what a point must be
    in_place: bool = False  # an increment too goes straight into the replica
    freeze: bool = True  # where rounds do not get smaller, a crash point may be taken under one
    cap: float = CAP  # seconds that a freeze may last
    pre: tuple[str, ...] = ()  # hooks, run before a freeze: for `filesystem` always, mounted or not
    post: tuple[str, ...] = ()  # and after it, on every way out
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
class Shipped:
    """What became of a plan. Bytes are those of all rounds of its capture."""

    point: Point
    rounds: int
    read: ExtentArray  # all that was read, coalesced
    different: ExtentArray  # in a resync, what was not the same on the replica
    bytes_written: int
    bytes_zeroed: int
    freeze_s: float


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
                raise NotTracked(
                    f"{self.device.path} is no longer tracked",
                    hint=f"run blktrack track {self.device.path} first",
                )
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
                sets.watch()
        # Under a freeze more is going to change: that has to be staged.
        if mode == "incremental" and not len(extents) and self.options.consistency != "filesystem":
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

    def ship(self, plan: Plan, sets: LinkSets, observer: Observer) -> Shipped:
        """Capture the planned extents, and bring the replica to the point that was reached.

        An increment is staged beside the replica and applied as a whole; a full copy or a resync,
        which have no point to protect, go straight into it. So does an increment that is asked to,
        or goes on with one that was. No bit of it is cleared before the commit: all that a replica
        at its old point lacks stays pending, whether it is restored to it or left half-way from it.
        """
        crash.point("ship-planned")
        increment, replica = plan.mode == "incremental", self.replica
        if plan.mode == "nothing":
            shipped = self._capture(plan, sets, observer, None)
            replica.commit(shipped.point)
        elif increment and replica.existing_state is State.READY and not self.options.in_place:
            with self._room(plan, observer), replica.stage() as stage:
                shipped = self._capture(plan, sets, observer, stage.end)
                stage.seal(shipped.read, shipped.point)
                observer.phase("apply", extent.total(shipped.read))
                replica.apply(stage, observer.done, self.options.stop)
        else:
            replica.begin(State.APPLYING if increment else State.UNFINISHED, plan.swap.generation)
            crash.point("ship-begun")
            try:
                shipped = self._capture(plan, sets, observer, None)
            except (NoPoint, Refused) as error:
                error.hint += "; until then the replica, written in place, is at no point"
                raise
            replica.commit(shipped.point)
        return shipped

    def _room(self, plan: Plan, observer: Observer) -> AbstractContextManager[None]:
        return room(
            self.replica.folder,
            self.device.path,
            plan.extents,
            stop=self.options.stop,
            limit=self.options.limit,
            progress=observer.done,
        )

    def _capture(
        self, plan: Plan, sets: LinkSets, observer: Observer, stage: Endpoint | None
    ) -> Shipped:
        """Read rounds into a stage or the replica, until the point asked for is reached."""
        kept = "the replica is at its point" if stage else "the replica is unfinished"
        copies: list[Copied] = []
        with open_end(self.device.path) as source, contextlib.ExitStack() as after:

            def freezing() -> Freeze | None:
                freeze = self._freeze()
                if freeze is not None:
                    after.callback(tell, freeze)
                return freeze

            def tell(freeze: Freeze) -> None:
                for warning in freeze.warnings:
                    observer.warn(warning)

            def read(extents: ExtentArray, ended: Callable[[], None]) -> None:
                before = sum(copied.bytes_read for copied in copies)
                copied = copy(
                    source,
                    stage or self.replica.end,
                    extents,
                    mode=Mode.REPAIR if plan.mode == "resync" and not copies else Mode.COPY,
                    granularity=max(sets.granularity, 4096),
                    progress=lambda count: observer.done(before + count),
                    checkpoint=None if plan.mode == "incremental" else sets.shipped,
                    read_done=ended,
                    stop=self.options.stop,
                    limit=self.options.limit,
                    known_zero=not copies and (stage is not None or self.replica.blank),
                )
                copies.append(copied)
                names = self.device.path, self.link.target
                judge(plan.mode, copied, *names, self.options, kept=kept)

            found = capture(
                Source(self.store, self.device, self.number, sets),
                plan.swap,
                plan.extents,
                read,
                consistency=self.options.consistency,
                freeze=freezing,
                cap=self.options.cap,
            )
        swap = found.swap
        return Shipped(
            Point(swap.epoch, swap.generation, swap.time, found.consistency),
            found.rounds if len(found.read) else 0,
            found.read,
            copies[0].different if copies else extent.empty(),
            sum(copied.bytes_written for copied in copies),
            sum(copied.bytes_zeroed for copied in copies),
            found.freeze_s,
        )

    def _freeze(self) -> Freeze | None:
        """The file systems of the source, to be frozen; None if there is nothing to freeze, or if
        it is not wanted. Refused."""
        wanted = self.options.consistency == "filesystem"
        if not wanted and not self.options.freeze:
            return None
        if not wanted and not file_systems(self.device):
            return None
        paths = self.store.paths
        must_write = [paths.run, paths.lib, *self.replica.writes]
        options = self.options
        return Freeze(
            self.device,
            partial(file_systems, self.device),
            lenient=not wanted,
            must_write=must_write,
            cap=options.cap,
            pre=options.pre,
            post=options.post,
        )

    def commit(self, point: Point, sets: LinkSets) -> None:
        """The replica is there: the link follows, then what it no longer has to ship goes."""
        crash.point("commit-replica")
        self.link.cursor = point
        self.link.phase = self.link.filled = self.link.reason = ""
        self.store.save_link(self.number, self.link)
        crash.point("commit-link")
        sets.all_shipped()
        crash.point("commit-sets")


def judge(
    mode: str, copied: Copied, path: str, target: str, options: Options, *, kept: str = ""
) -> None:
    """An incomplete copy is no point: say what is missing. `kept` is what became of the replica."""
    kept = f"{kept}; " if kept else ""
    if len(copied.failed):
        places = extent.to_list(copied.failed)
        shown = ", ".join(str(place) for place in places[:4])
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        raise CopyFailed(
            f"{path} could not be read at {shown}{more} "
            f"({format_size(extent.total(copied.failed))})",
            hint=f"{kept}these extents stay pending: check the disk, try again",
        )
    if copied.interrupted:
        raise Interrupted(
            f"{mode} of {path} and {target} was interrupted",
            signum=options.signum,
            hint=f"{kept}run it again to go on",
        )
