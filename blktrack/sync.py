"""Bringing a replica to a point of its source, and comparing the two.

Locks are taken in this order: the replica, and with it the link, for the whole sync; the device for
the time of a swap.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import numpy as np

from blktrack import extent
from blktrack.errors import Interrupted
from blktrack.report import SyncReport, VerifyReport
from blktrack.round import Observer, Options, Plan, Round, Shipped, judge
from blktrack.ship.apply import ApplyStopped
from blktrack.ship.copy import Mode, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.replica import Replica
from blktrack.ship.target import Target
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
    try:
        plan, shipped = _bring(store, path, target, options, observer)
    except ApplyStopped as error:
        raise Interrupted(str(error), signum=options.signum, hint=error.hint) from error
    report = SyncReport(
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
        duration_s=time.monotonic() - begun,
    )
    return report, shipped


def _bring(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> tuple[Plan, Shipped]:
    state, device = find(store, path)
    known = _find_link(store, state.id, target)
    with Replica.open(
        target,
        source=device,
        link=known.id if known else None,
        paths=store.paths,
        force=options.force,
        stop=options.stop,
    ) as replica:
        # Read anew: whoever had the replica until now may have moved the cursor.
        link = _find_link(store, state.id, target) or _new_link(store, state.id, target, replica)
        current = Round(store, device, state.id, link, replica, options)
        try:
            return _ship(current, observer)
        except Gap:
            # It came while the source was read: a new generation, and a resync, in one go.
            return _ship(current, observer)


def _ship(current: Round, observer: Observer) -> tuple[Plan, Shipped]:
    plan, sets = current.prepare()
    replica = current.replica.target.device
    with sets, Watch(current.options.stop, current.device, replica, writable=True):
        observer.phase(plan.mode, extent.total(plan.extents))
        shipped = current.ship(plan, sets, observer)
        current.commit(shipped.point, sets)
    return plan, shipped


def _find_link(store: Store, number: str, target: str) -> LinkState | None:
    return next((link for link in store.links(number) if link.target == target), None)


def _new_link(store: Store, number: str, target: str, replica: Replica) -> LinkState:
    base = name = Path(target).name
    taken = {link.name for link in store.links(number)}
    number_of = count(2)
    while name in taken:
        name = f"{base}-{next(number_of)}"
    return LinkState(replica.link, name, target)


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
        judge("verify", copied, path, target, options)
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
    report, shipped = sync(store, path, target, options, observer)
    different = extent.total(shipped.different)
    return VerifyReport(
        bytes_compared=report.bytes_changed,
        bytes_different=different,
        bytes_repaired=different,
        extents=shipped.different.tolist(),
    )
