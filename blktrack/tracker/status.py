"""What `status` and `extents` tell of tracked devices and their replicas."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from blktrack import bitmap, extent, history
from blktrack.bitmap import Words
from blktrack.errors import BlktrackError, UsageError
from blktrack.point import Point
from blktrack.report import DeviceStatus, ExtentsReport, LastRun, LinkStatus, Past, Run
from blktrack.ship.address import is_remote
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
    """Every device, or the one named, with the last runs of their links. Doubts found here are
    recorded like anywhere else; no other host is asked for anything."""
    if path is None:
        known = [state for state in store.devices() if state.wanted or state.doubts]
        reports = [(state, status_of(store, state, present(state))) for state in known]
    else:
        state, device = find_any(store, path)
        there = device if device and device.size else present(state)
        reports = [(state, status_of(store, state, there))]
    for state, report in reports:
        _tell_runs(store, state, report)
    return [report for _, report in reports]


def _tell_runs(store: Store, state: DeviceState, report: DeviceStatus) -> None:
    """As far as they are on record."""
    keys = [history.key(link.name, link.target) for link in report.links]
    try:
        last = history.latest(store, state.id, set(keys))
        failed = history.latest(store, state.id, set(keys), failed=True)
    except BlktrackError:  # `blktrack history` says what is wrong with it
        return
    for link, its in zip(report.links, keys, strict=True):
        if run := last.get(its):
            link.last_run = _last_run(run)
        # One that gave way is told of only while nothing else has come since.
        if bad := run if run and run.exit else failed.get(its):
            link.last_error = Past(bad.error, bad.begun + bad.duration_s)


def _last_run(run: Run) -> LastRun:
    moved = run.bytes_wire if is_remote(run.target) else run.bytes_shipped
    told = moved and run.duration_s and run.mode != "nothing"
    return LastRun(
        begun=run.begun,
        duration_s=run.duration_s,
        exit=run.exit,
        error=run.error,
        mode=run.mode,
        bytes_shipped=run.bytes_shipped,
        bytes_wire=run.bytes_wire,
        rate=moved / run.duration_s if told else None,
    )


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
    pending = held = None
    if tracking is not None and live is not None:
        pending = _bytes(state, _pending(tracking, link, live))
        if is_remote(link.target):
            missing = _pending(tracking, link, live, held=False) if link.stage else None
            held = 0 if missing is None else max(pending - _bytes(state, missing), 0)
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
        route=link.route,
        held_bytes=held,
    )


def of_replica(store: Store, link: LinkState, cursor: Point) -> tuple[str, str, bool]:
    """State of a replica that was at `cursor`, what seems to have happened to it since, and False
    where a copy that has not ended took it from its point. Of streams nobody knows."""
    if not link.target:
        return "ready", "", True
    if is_remote(link.target):
        return _elsewhere(link)
    try:
        record, change = inspect(link.target, store.paths)
    except BlktrackError as error:
        return "resync", str(error), True
    at_point = record is None or record.state is State.READY
    if change:
        return "resync", f"the replica is not as it was left: {change}", at_point
    if record is None or record.point not in (cursor, link.sealing or cursor):
        return "resync", "the replica is not at the point that it was brought to", at_point
    if record.state is State.APPLYING:
        return "unfinished", "an increment is half in it: the next sync goes on with that", False
    return "ready", "", at_point


def _elsewhere(link: LinkState) -> tuple[str, str, bool]:
    """As `of_replica`, by what the last run knew of it: its host is not asked."""
    if link.away:
        what = "a full copy of it has not ended" if link.phase else "an increment is half in it"
        return "unfinished", f"{what}: the next sync goes on with that", False
    if link.sealing:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(link.sealing.time))
        return "ready", f"it was asked to go on to {when}, and has not said that it did", True
    return "ready", "", True


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


def _bytes(state: DeviceState, found: Words) -> int:
    return extent.total(bitmap.extents(found, state.granularity, state.size))


def _pending(tracking: Tracking, link: LinkState, live: Words, *, held: bool = True) -> Words:
    """What a link has to ship; all of the device if that is not known to be less. Without `held`
    it is what no stage has."""
    generation_id = tracking.state.generation
    known = link.cursor is not None and link.cursor.generation == generation_id
    if known or link.filled == generation_id:
        with contextlib.suppress(FileNotFoundError), LinkSets(tracking, link) as sets:
            return sets.union(live, held=held)
    every: Words = np.zeros(tracking.words, dtype=np.uint64)
    bitmap.set_range(every, 0, tracking.window.geometry.granules)
    return every
