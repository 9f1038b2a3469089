"""What `status` and `extents` tell of tracked devices and their replicas."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from blktrack import bitmap, extent
from blktrack.bitmap import Words
from blktrack.errors import BlktrackError, UsageError
from blktrack.point import Point
from blktrack.report import DeviceStatus, ExtentsReport, LinkStatus, Past
from blktrack.ship.place import inspect
from blktrack.ship.record import State
from blktrack.state import DeviceState, Doubt, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import doubt
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import PATIENCE, hold, open_tracking
from blktrack.tracker.tracker import find, find_any, present
from blktrack.tracker.tracking import Gap, Tracking


def extents(store: Store, path: str, target: str | None) -> ExtentsReport:
    """What the next sync would ship: to one replica or, without one named, to any."""
    state, device = find(store, path)
    links = store.links(state.id)
    if target is not None:
        links = [link for link in links if target in (link.target, link.name)]
        if not links:
            raise UsageError(f"{path} has no replica {target}", hint="see blktrack status")
    with hold(store, state.id, path), open_tracking(store, state, device) as tracking:
        found = tracking.live()
        for link in links:
            found |= _pending(tracking, link, found)
        listed = bitmap.extents(found, state.granularity, state.size)
        return ExtentsReport(
            device=path,
            granularity=state.granularity,
            generation=state.generation,
            epoch=tracking.epoch.number,
            bytes=extent.total(listed),
            extents=listed.tolist(),
        )


def status(store: Store, path: str | None) -> list[DeviceStatus]:
    """Every device, or the one named. Doubts found here are recorded like anywhere else."""
    if path is None:
        known = [state for state in store.devices() if state.wanted or state.doubts]
        return [status_of(store, state, present(state)) for state in known]
    state, device = find_any(store, path)
    return [status_of(store, state, device if device and device.size else present(state))]


def glance(store: Store, state: DeviceState) -> list[LinkStatus]:
    """What is known of the replicas of a device without its lock and the kernel."""
    return [_link_status(store, state, link, None, None) for link in store.links(state.id)]


def status_of(
    store: Store, state: DeviceState, device: BlockDevice | None, wait: float = PATIENCE
) -> DeviceStatus:
    """That of one device, which is None if it is away. Busy if its lock is not free after `wait`
    seconds."""
    report = DeviceStatus(
        device=device.path if device else state.path,
        size=state.size,
        granularity=state.granularity,
        state="absent",
        reason="no device with its identity is there",
        since=None,
        generation=state.generation,
        epoch=0,
        dirty_bytes=0,
        written_bytes=0,
        writes=0,
        losses=0,
    )
    live: Words | None = None
    with hold(store, state.id, state.path, wait=wait), contextlib.ExitStack() as stack:
        state = store.device(state.id) or state
        tracking = None
        if state.resting:
            report.state, report.reason = "stopped", "stopped cleanly; blktrack start goes on"
        elif device is not None:
            try:
                tracking = stack.enter_context(open_tracking(store, state, device))
            except Gap:
                report.state = "gap"
                report.reason = state.doubts[-1].reason if state.doubts else "tracking never began"
                report.since = state.doubts[-1].time if state.doubts else None
        if tracking is not None:
            counters = tracking.counters()
            live = tracking.live()
            report.state, report.reason, report.since = "tracking", "", state.began
            report.size, report.epoch = state.size, tracking.epoch.number
            report.dirty_bytes = min(bitmap.count(live) * state.granularity, state.size)
            report.written_bytes, report.writes = counters["written"], counters["writes"]
            report.losses = sum(counters[name] for name in doubt.LOSSES)
        report.generation = state.generation
        report.doubts = _told(state.doubts)
        for link in store.links(state.id):
            report.links.append(_link_status(store, state, link, tracking, live))
    return report


def _told(doubts: list[Doubt]) -> list[Past]:
    """Newest first."""
    return [Past(past.reason, past.time) for past in reversed(doubts)]


def _link_status(
    store: Store, state: DeviceState, link: LinkState, tracking: Tracking | None, live: Words | None
) -> LinkStatus:
    cursor = link.cursor
    reason = resync_reason(state, link)
    state_of = "initial" if cursor is None else "resync" if reason else "ready"
    point = cursor
    if cursor is not None:
        seen, why, at_point = of_replica(store, link, cursor)
        point = cursor if at_point else None
        if state_of == "ready":
            state_of, reason = seen, why
    pending = None
    if tracking is not None and live is not None:
        found = _pending(tracking, link, live)
        pending = extent.total(bitmap.extents(found, state.granularity, state.size))
    return LinkStatus(
        target=link.target,
        name=link.name,
        epoch=cursor.epoch if cursor else None,
        point=point.time if point else None,
        consistency=point.consistency if point else None,
        lag_s=time.time() - point.time if point else None,
        pending_bytes=pending,
        state=state_of,
        reason=reason,
        resyncs=_told(link.doubts),
    )


def of_replica(store: Store, link: LinkState, cursor: Point) -> tuple[str, str, bool]:
    """State of a replica that was at `cursor`, what seems to have happened to it since, and False
    where a copy that has not ended took it from its point. Of streams nobody knows."""
    if not link.target:
        return "ready", "", True
    try:
        record, change = inspect(link.target, store.paths)
    except BlktrackError as error:
        return "resync", str(error), True
    at_point = record is None or record.state is State.READY
    if change:
        return "resync", f"the replica is not as it was left: {change}", at_point
    if record is None or record.lacks(cursor):
        return "resync", "the replica is not at the point that it was brought to", at_point
    if record.state is State.APPLYING:
        return "unfinished", "an increment is half in it: the next sync goes on with that", False
    return "ready", "", at_point


def resync_reason(state: DeviceState, link: LinkState) -> str:
    """Why the link's replica has to be compared with the source; "" if it has not."""
    if link.cursor is None:
        return ""
    if link.phase == "resync":
        return link.reason
    if state.generation and link.cursor.generation == state.generation:
        return ""
    ended = [doubt.reason for doubt in state.doubts if doubt.generation == link.cursor.generation]
    return ended[-1] if ended else "tracking began anew since its last sync"


def _pending(tracking: Tracking, link: LinkState, live: Words) -> Words:
    """What a link has to ship; all of the device if that is not known to be less."""
    generation_id = tracking.state.generation
    known = link.cursor is not None and link.cursor.generation == generation_id
    if known or link.filled == generation_id:
        with contextlib.suppress(FileNotFoundError), LinkSets(tracking, link) as sets:
            return sets.union(live)
    every: Words = np.zeros(tracking.words, dtype=np.uint64)
    bitmap.set_range(every, 0, tracking.window.geometry.granules)
    return every
