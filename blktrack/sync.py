"""One sync round: drain, plan, copy, commit.

Locks are taken in this order: the replica (and with it the link) for the whole sync, the device for
the time of a swap. What was begun and not committed is finished by the next sync: see `state`.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from blktrack import bitmap, capture, durable, extent
from blktrack.errors import CopyFailed, Interrupted, NotTracked, ResyncNeeded
from blktrack.extent import ExtentArray
from blktrack.report import SyncReport, VerifyReport
from blktrack.ship.copy import Copied, Mode, copy
from blktrack.ship.endpoint import Endpoint, open_end
from blktrack.ship.replica import Replica
from blktrack.state import Cursor, DeviceState, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation
from blktrack.tracker.link import LinkSets
from blktrack.tracker.tracker import find, hold, resync_reason
from blktrack.tracker.tracking import Gap, Swap, Tracking
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
    link = _link(store, state, target)
    with (
        durable.lock(
            store.link_run(state.id, link.id) / "lock", what=f"the link {path} -> {target}"
        ),
        Replica.open(
            target, source=device, link=link.id, paths=store.paths, force=options.force
        ) as replica,
    ):
        plan, sets = _prepare(store, device, state.id, link, replica, options)
        with sets:
            observer.phase(plan.mode, extent.total(plan.extents))
            level, copied = _ship(store, device, state.id, plan, sets, replica, options, observer)
            _judge(plan, copied, path, target, options)
            point = Cursor(plan.swap.generation, plan.swap.epoch, plan.swap.time, level)
            replica.commit(point)
            link.cursor, link.phase, link.filled, link.reason = point, "", "", ""
            store.save_link(state.id, link)
            sets.all_shipped()
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


def _link(store: Store, state: DeviceState, target: str) -> LinkState:
    """The link of this device to this target, known or new."""
    links = store.links(state.id)
    for link in links:
        if link.target == target:
            return link
    name = Path(target).name or "replica"
    taken = {link.name for link in links}
    unique = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 999))) if n not in taken)
    return LinkState(str(uuid.uuid4()), unique, target)


def _prepare(
    store: Store,
    device: BlockDevice,
    number: str,
    link: LinkState,
    replica: Replica,
    options: Options,
) -> tuple[Plan, LinkSets]:
    """Close the epoch and decide what this round ships. A gap begins a new generation here."""
    with hold(store, number, device.path):
        state = store.device(number)
        if state is None or not state.wanted:
            raise NotTracked(f"{device.path} is no longer tracked")
        tracking, swap = _drained(store, state, device, link, options)
        with tracking:
            mode, reason = _mode(state, link, replica, options)
            sets = None
            if mode == "incremental" or link.filled == state.generation:
                try:
                    sets = LinkSets(tracking, link)
                except FileNotFoundError:
                    mode, reason = "resync", "its pending set is gone"
            if mode == "resync" and options.no_resync:
                raise ResyncNeeded(
                    f"{link.target} needs a resync: {reason}", hint="run it without --no-resync"
                )
            if sets is None:
                sets = LinkSets(tracking, link, create=True)
            if mode == "incremental":
                extents = sets.take()
            elif link.filled == state.generation and link.phase == mode:
                extents = sets.take()  # goes on where it was interrupted
            else:
                sets.fill()
                link.phase, link.filled, link.reason = mode, state.generation, reason
                extents = sets.extents()
            store.save_link(number, link)
    if mode == "incremental" and not len(extents):
        mode = "nothing"
    return Plan(mode, reason, swap, extents), sets


def _drained(
    store: Store, state: DeviceState, device: BlockDevice, link: LinkState, options: Options
) -> tuple[Tracking, Swap]:
    """The open tracking just after a swap; after a gap, of a new generation."""
    try:
        tracking = Tracking(store, state, device)
        return tracking, tracking.drain()
    except Gap as gap:
        if options.no_resync and link.cursor is not None:
            raise ResyncNeeded(
                f"tracking has a gap: {gap}", hint="run it without --no-resync"
            ) from gap
    state = generation.begin(store, device, state.granularity or None)
    tracking = Tracking(store, state, device)
    return tracking, tracking.drain()


def _mode(
    state: DeviceState, link: LinkState, replica: Replica, options: Options
) -> tuple[str, str]:
    if options.full:
        return "initial", "a full copy was asked for"
    if link.cursor is None and not replica.holds_point:
        return "initial", ""
    if options.resync:
        return "resync", options.resync
    if replica.changed:
        return "resync", replica.changed
    if link.cursor is None:
        return "resync", "the link is new and the replica is not"
    if reason := resync_reason(state, link):
        return "resync", reason
    return "incremental", ""


def _ship(
    store: Store,
    device: BlockDevice,
    number: str,
    plan: Plan,
    sets: LinkSets,
    replica: Replica,
    options: Options,
    observer: Observer,
) -> tuple[str, Copied]:
    """Copy the planned extents; the consistency of what was read, and what became of it."""
    level = "none"

    def read_done() -> None:
        nonlocal level
        level = capture.consistency(store, device, number, plan.swap)

    if not len(plan.extents):
        read_done()
        return level, Copied()
    replica.begin(initial=plan.mode == "initial")
    with open_end(device.path) as source:
        copied = copy(
            source,
            replica.end,
            plan.extents,
            mode=Mode.REPAIR if plan.mode == "resync" else Mode.COPY,
            granularity=max(sets.granularity, 4096),
            progress=observer.done,
            checkpoint=sets.shipped,
            read_done=read_done,
            stop=options.stop,
            limit=options.limit,
            known_zero=replica.fresh,
        )
    return level, copied


def _judge(plan: Plan, copied: Copied, path: str, target: str, options: Options) -> None:
    """An incomplete copy is no point: say what is missing. What was shipped stays shipped."""
    if len(copied.failed):
        places = extent.to_list(copied.failed)
        shown = ", ".join(str(place) for place in places[:4])
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        raise CopyFailed(
            f"{path} could not be read at {shown}{more} "
            f"({format_size(extent.total(copied.failed))}); the rest was shipped",
            hint="these extents stay pending: check the disk and run the sync again",
        )
    if copied.interrupted:
        raise Interrupted(
            f"the {plan.mode} sync of {path} to {target} was interrupted",
            signum=options.signum,
            hint="what was shipped is kept: the next sync goes on from there",
        )


def verify(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> VerifyReport:
    """Compare every byte of the device with the replica; nothing is written."""
    device = BlockDevice.find(path)
    with open_end(device.path) as source, open_end(target) as replica:
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
    if copied.interrupted:
        raise Interrupted(f"verify of {path} was interrupted", signum=options.signum)
    if len(copied.failed):
        _judge(Plan("verify", "", Swap("", 0, 0.0), whole), copied, path, target, options)
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
