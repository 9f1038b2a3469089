"""Bringing a replica to a point of its source.

Locks are taken in this order: the replica and the link, for the whole sync; the device for the time
of a swap. What is lost on the way to another host is tried again: each attempt is a whole sync, and
goes on with what the one before has brought there.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count

from blktrack import extent, history
from blktrack.durable import lock
from blktrack.errors import BlktrackError, Busy, Refused
from blktrack.observer import Observer
from blktrack.options import Options
from blktrack.replication import LocalReplication, RemoteReplication, Replication
from blktrack.report import SyncReport
from blktrack.round import Plan, Shipped
from blktrack.ship.address import Address, is_remote, short_name
from blktrack.ship.apply import ApplyStopped
from blktrack.ship.diagnosis import ConnectionFailed
from blktrack.ship.remote import RemoteReplica, Wire
from blktrack.ship.replica import Replica
from blktrack.ship.retry import Retry
from blktrack.ship.room import Cramped
from blktrack.ship.routes import PathWatch, RouteLook
from blktrack.ship.target import mount_point
from blktrack.ship.wire.errors import ConnectionLost
from blktrack.state import LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.tracker import find
from blktrack.tracker.tracking import Gap
from blktrack.uevents import Watch


def sync(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> tuple[SyncReport, Shipped]:
    """Bring the replica at `target` to a point of the device at `path`."""
    begun = time.monotonic()
    state, device = find(store, path)
    kept = options.history
    with (
        options.limited(),
        history.recorded(
            store, state.id, "sync", target=target, keep=kept, warn=observer.warn
        ) as record,
    ):
        run = _Run(store, state.id, device, target, options, observer)
        try:
            plan, shipped = run.bring()
        except ApplyStopped as error:
            raise options.interrupted(str(error), error.hint) from error
        finally:
            record.wire(run.wire.sent + run.wire.received)
        report = _report(plan, shipped, run.wire, time.monotonic() - begun)
        record(report)
    return report, shipped


def _report(plan: Plan, shipped: Shipped, wire: Wire, duration_s: float) -> SyncReport:
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
        bytes_wire=wire.sent + wire.received,
        freeze_s=shipped.freeze_s,
        duration_s=duration_s,
    )


@dataclass
class _Run:
    """One sync. `number` is the device's id."""

    store: Store
    number: str
    device: BlockDevice
    target: str
    options: Options
    observer: Observer
    wire: Wire = field(init=False)
    route: RouteLook | None = None  # to the other host

    def __post_init__(self) -> None:
        self.wire = wire_of(self.options)

    def bring(self) -> tuple[Plan, Shipped]:
        if is_remote(self.target):
            return self._over_the_wire(Address.parse(self.target))
        known = self._find_link()
        if known is not None and not self.options.force:
            _check_mount(known)
        return self._once(
            Replica.open(
                self.target,
                source=self.device,
                link=known.id if known else None,
                paths=self.store.paths,
                force=self.options.force,
                stop=self.options.stop,
                observer=self.observer,
            )
        )

    def _over_the_wire(self, address: Address) -> tuple[Plan, Shipped]:
        """As often as connections are lost and there is time to try again."""
        with PathWatch() as watch:
            retry = Retry(self.options.retry_for, self.options.stop, watch)
            self.wire.durable = retry.progress
            lost = False
            while True:
                try:
                    known = self._find_link()
                    self.route = RouteLook(address)
                    return self._once(
                        RemoteReplica.open(
                            address,
                            source=self.device,
                            link=known.id if known else None,
                            wire=self.wire,
                            stop=self.options.stop,
                            force=self.options.force,
                            observer=self.observer,
                        )
                    )
                except (ConnectionLost, ConnectionFailed, Busy) as error:
                    if self.options.stop.is_set():
                        raise self._interrupted() from error
                    # The keeper of the connection before may not have noticed yet that it is gone.
                    if not (lost if isinstance(error, Busy) else _is_transient(error)):
                        raise
                    lost = True
                    self.observer.phase(f"trying again: {error}", 0)
                    if not retry.wait():
                        if self.options.stop.is_set():
                            raise self._interrupted() from error
                        raise

    def _interrupted(self) -> BlktrackError:
        return self.options.interrupted(
            f"sync of {self.device.path} and {self.target} was interrupted",
            "what the other host holds durably is kept; run it again to go on",
        )

    def _once(self, opened: Replica | RemoteReplica) -> tuple[Plan, Shipped]:
        with (
            opened as replica,
            lock(
                self.store.link_lock(self.number, replica.link), what=f"the link to {self.target}"
            ),
        ):
            # Read anew: whoever had it until now may have moved the cursor.
            link = self._find_link() or self._new_link(replica)
            current = self._replication(replica, link)
            try:
                return self._with_room(current)
            except Gap as gap:
                self.observer.phase(f"once more, from a new beginning: {gap}", 0)
                # It came while the source was read: a new generation, and a resync, in one go. A
                # source that has grown is no gap to another round, but may be too large by now.
                replica.check_room()
                return self._with_room(current)

    def _replication(self, replica: Replica | RemoteReplica, link: LinkState) -> Replication:
        shared = (self.store, self.device, self.number, link, self.options)
        if isinstance(replica, RemoteReplica):
            link.route = self.route.told() if self.route else ""
            return RemoteReplication(*shared, replica)
        link.mount = "" if replica.target.device else mount_point(replica.target.path)
        return LocalReplication(*shared, replica)

    def _with_room(self, current: Replication) -> tuple[Plan, Shipped]:
        try:
            return self._ship(current)
        except Cramped as cramped:
            self.observer.phase(f"once more, without what was kept there: {cramped}", 0)
            return self._ship(current)

    def _ship(self, current: Replication) -> tuple[Plan, Shipped]:
        plan, sets = current.prepare(self.observer)
        with sets, self._watch(current.replica):
            shipped = current.ship(plan, sets, self.observer)
            current.commit(shipped.point, sets)
        return plan, shipped

    def _watch(self, replica: Replica | RemoteReplica) -> AbstractContextManager[object]:
        other = None if isinstance(replica, RemoteReplica) else replica.target.device
        return Watch(self.options.stop, self.device, other, writable=True)

    def _find_link(self) -> LinkState | None:
        links = self.store.links(self.number)
        return next((link for link in links if link.target == self.target), None)

    def _new_link(self, replica: Replica | RemoteReplica) -> LinkState:
        base = name = short_name(self.target)
        taken = {link.name for link in self.store.links(self.number)}
        number_of = count(2)
        while name in taken:
            name = f"{base}-{next(number_of)}"
        return LinkState(replica.link, name, self.target)


def wire_of(options: Options) -> Wire:
    """How connections of a run are spoken over."""
    return Wire(
        compress=options.compress,
        limit=options.limit,
        patience=options.patience,
        interactive=options.interactive,
    )


def _is_transient(error: BlktrackError) -> bool:
    return error.retriable if isinstance(error, ConnectionFailed) else True


def _check_mount(link: LinkState) -> None:
    """Where a backup disk is not mounted, a new replica would fill the file system below it."""
    if link.mount and not os.path.ismount(link.mount) and not os.path.exists(link.target):
        raise Refused(
            f"{link.target} is gone, and nothing is mounted at {link.mount}, where it was",
            hint="mount it; or give --force, and a new replica is made by a full copy",
        )
