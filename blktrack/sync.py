"""Bringing a replica of this host to a point of its source.

Locks are taken in this order: the replica and the link, for the whole sync; the device for the time
of a swap.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from blktrack import crash, extent, history
from blktrack.durable import lock
from blktrack.errors import Interrupted, NoPoint, Refused
from blktrack.observer import Observer
from blktrack.options import Options
from blktrack.point import Point
from blktrack.quiesce.find import devices_below
from blktrack.report import SyncReport
from blktrack.round import Plan, Round, Shipped
from blktrack.ship.apply import ApplyStopped
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.ship.room import room
from blktrack.ship.target import mount_point
from blktrack.state import DeviceState, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.link import LinkSets
from blktrack.tracker.status import resync_reason
from blktrack.tracker.tracker import find
from blktrack.tracker.tracking import Gap
from blktrack.uevents import Watch

_DURABLE = "writing back what was copied"


def sync(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> tuple[SyncReport, Shipped]:
    """Bring the replica at `target` to a point of the device at `path`."""
    begun = time.monotonic()
    state, device = find(store, path)
    kept = options.history
    with history.recorded(
        store, state.id, "sync", target=target, keep=kept, warn=observer.warn
    ) as record:
        try:
            plan, shipped = _bring(
                store, state.id, device, target, options=options, observer=observer
            )
        except ApplyStopped as error:
            raise Interrupted(str(error), signum=options.signum, hint=error.hint) from error
        report = _report(plan, shipped, time.monotonic() - begun)
        record(report)
    return report, shipped


def _report(plan: Plan, shipped: Shipped, duration_s: float) -> SyncReport:
    return SyncReport(
        mode=plan.mode,
        reason=plan.reason,
        consistency=shipped.point.consistency,
        epoch=shipped.point.epoch,
        point=shipped.point.time,
        rounds=shipped.rounds,
        extents=len(shipped.read),
        bytes_changed=extent.total(shipped.read),
        bytes_shipped=shipped.bytes_written,
        bytes_zeroed=shipped.bytes_zeroed,
        bytes_wire=0,
        freeze_s=shipped.freeze_s,
        duration_s=duration_s,
    )


def _bring(
    store: Store,
    number: str,
    device: BlockDevice,
    target: str,
    *,
    options: Options,
    observer: Observer,
) -> tuple[Plan, Shipped]:
    known = _find_link(store, number, target)
    if known is not None and not options.force:
        _check_mount(known)
    with (
        Replica.open(
            target,
            source=device,
            link=known.id if known else None,
            paths=store.paths,
            force=options.force,
            stop=options.stop,
            observer=observer,
        ) as replica,
        lock(store.link_lock(number, replica.link), what=f"the link to {target}"),
    ):
        # Read anew: whoever had it until now may have moved the cursor.
        link = _find_link(store, number, target)
        link = link or _new_link(store, number, target, replica)
        link.mount = "" if replica.target.device else mount_point(replica.target.path)
        current = Replication(store, device, number, link, options, replica)
        try:
            return _ship(current, observer)
        except Gap as gap:
            observer.phase(f"once more, from a new beginning: {gap}", 0)
            # It came while the source was read: a new generation, and a resync, in one go. A
            # source that has grown is no gap to another round, but may be too large by now.
            replica.check_room()
            return _ship(current, observer)


def _ship(current: Replication, observer: Observer) -> tuple[Plan, Shipped]:
    plan, sets = current.prepare(observer)
    replica = current.replica.target.device
    with sets, Watch(current.options.stop, current.device, replica, writable=True):
        shipped = current.ship(plan, sets, observer)
        current.commit(shipped.point, sets)
    return plan, shipped


def _find_link(store: Store, number: str, target: str) -> LinkState | None:
    return next((link for link in store.links(number) if link.target == target), None)


def _check_mount(link: LinkState) -> None:
    """Where a backup disk is not mounted, a new replica would fill the file system below it."""
    if link.mount and not os.path.ismount(link.mount) and not os.path.exists(link.target):
        raise Refused(
            f"{link.target} is gone, and nothing is mounted at {link.mount}, where it was",
            hint="mount it; or give --force, and a new replica is made by a full copy",
        )


def _new_link(store: Store, number: str, target: str, replica: Replica) -> LinkState:
    base = name = Path(target).name
    taken = {link.name for link in store.links(number)}
    number_of = count(2)
    while name in taken:
        name = f"{base}-{next(number_of)}"
    return LinkState(replica.link, name, target)


@dataclass
class Replication(Round):
    """A round into a replica."""

    replica: Replica

    def mode(self, state: DeviceState) -> tuple[str, str]:
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

    def committed(self) -> Point | None:
        record = self.replica.record
        return record.point if record and self.replica.has_point else None

    def has_part(self) -> bool:
        unfinished = self.replica.existing_state is State.UNFINISHED
        return unfinished and not self.replica.changed

    @property
    def writes(self) -> list[Path]:
        return [*super().writes, *self.replica.writes]

    def ship(self, plan: Plan, sets: LinkSets, observer: Observer) -> Shipped:
        """Capture the planned extents, and bring the replica to the point that was reached.

        An increment is staged beside the replica and applied as a whole; a full copy or a resync,
        which have no point to protect, go straight into it. So does an increment that cannot be
        staged. No bit of it is cleared before the commit: all that a replica
        at its old point lacks stays pending, whether it is restored to it or left half-way from it.
        """
        crash.point("ship-planned")
        increment, replica = plan.mode == "incremental", self.replica
        if plan.mode == "nothing":
            # Not announced: nothing was taken that could be shipped again.
            shipped = self.capture(plan, sets, observer, replica.end)
            replica.commit(shipped.point)
        elif increment and self._can_stage:
            with self._room(plan, observer), replica.stage() as stage:
                shipped = self.capture(plan, sets, observer, stage.end)
                observer.phase(_DURABLE, 0)
                self.course.announce(shipped.point)
                stage.seal(shipped.read, shipped.point)
                observer.phase("apply", extent.total(shipped.read))
                replica.apply(stage, observer.done, self.options.stop)
        else:
            replica.begin(State.APPLYING if increment else State.UNFINISHED, plan.swap.generation)
            crash.point("ship-begun")
            try:
                shipped = self.capture(
                    plan,
                    sets,
                    observer,
                    replica.end,
                    durable=None if increment else sets.shipped,
                    compare=plan.mode == "resync",
                    blank=replica.blank,
                    kept="the replica is unfinished",
                )
            except (NoPoint, Refused) as error:
                error.hint += "; until then the replica, written in place, is at no point"
                raise
            observer.phase(_DURABLE, 0)
            self.course.announce(shipped.point)
            replica.commit(shipped.point)
        return shipped

    @property
    def _can_stage(self) -> bool:
        """Unless it is asked not to, or the replica is on its way to a point already. Nor on the
        source itself: what is staged there would be part of the next increment, which would grow
        until it fills the source."""
        if self.options.in_place or self.replica.existing_state is not State.READY:
            return False
        return self.device.number not in devices_below(self.replica.folder)

    def _room(self, plan: Plan, observer: Observer) -> AbstractContextManager[None]:
        return room(
            self.replica.folder,
            self.device.path,
            plan.extents,
            stop=self.options.stop,
            limit=self.options.limit,
            observer=observer,
        )
