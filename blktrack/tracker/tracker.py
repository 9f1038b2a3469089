"""Finding, tracking and untracking devices; what `status` and `extents` tell."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np

from blktrack import bitmap, extent
from blktrack.bitmap import Words
from blktrack.device import device_id, source
from blktrack.errors import NotTracked, Refused, UsageError
from blktrack.report import DeviceStatus, ExtentsReport, LinkStatus, TrackReport
from blktrack.state import DeviceState, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import doubt, generation
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.tracking import Gap, Tracking
from blktrack.units import format_size


def find(store: Store, path: str) -> tuple[DeviceState, BlockDevice]:
    """A device that the user asked to track. NotTracked otherwise."""
    device = source(path)
    state = store.device(device_id(device))
    if state is None or not state.wanted:
        raise NotTracked(f"{path} is not tracked", hint=f"run blktrack track {path} first")
    return state, device


def track(store: Store, path: str, granularity: int | None) -> TrackReport:
    """Attach to a device; one that is tracked soundly is left as it is."""
    device = source(path)
    number = device_id(device)
    if granularity:
        generation.check_granularity(granularity, device)
    with hold(store, number, path):
        state = store.device(number)
        began = True
        if state is not None and state.wanted:
            with contextlib.suppress(Gap), open_tracking(store, state, device):
                began = False
        if not began and state is not None and granularity not in (None, state.granularity):
            raise Refused(
                f"{path} is tracked with a granularity of {format_size(state.granularity)}",
                hint="untrack it first; the next sync of each replica is then a resync",
            )
        if began:
            kept = state.granularity if state is not None and state.wanted else None
            state = generation.begin(store, device, granularity or kept)
    assert state is not None
    window = generation.window_of(device, state.size, state.granularity)
    return TrackReport(
        device=path,
        size=state.size,
        granularity=state.granularity,
        generation=state.generation,
        began=began,
        kernel_bytes=2 * window.geometry.map_bytes,
        warnings=_warnings(store, device),
    )


def untrack(store: Store, path: str) -> None:
    """Detach. What links had to ship is forgotten, so their next sync will be a resync."""
    state, _ = find_any(store, path)
    with hold(store, state.id, path):
        generation.end(store, state, "it was untracked")
        generation.detach(store, state)
        store.drop_rest(state.id)
        state.wanted = False
        store.save_device(state)


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
        return [_status(store, state, present(state)) for state in known]
    state, device = find_any(store, path)
    return [_status(store, state, device if device and device.size else present(state))]


def wanted_devices(store: Store) -> list[BlockDevice]:
    """Every tracked device that is there."""
    found = [present(state) for state in store.devices() if state.wanted]
    return [device for device in found if device]


def find_any(store: Store, path: str) -> tuple[DeviceState, BlockDevice | None]:
    """A device by path even if it is away or no longer a fit source."""
    with contextlib.suppress(UsageError):
        device = BlockDevice.find(path)
        if state := store.device(device_id(device)):
            return state, device
    for state in store.devices():
        if state.path == path:
            return state, None
    raise NotTracked(f"{path} is not tracked", hint=f"run blktrack track {path} first")


def _status(store: Store, state: DeviceState, device: BlockDevice | None) -> DeviceStatus:
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
    with hold(store, state.id, state.path), contextlib.ExitStack() as stack:
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
        report.doubts = [
            {"reason": past.reason, "time": past.time} for past in reversed(state.doubts)
        ]
        for link in store.links(state.id):
            report.links.append(_link_status(state, link, tracking, live))
    return report


def present(state: DeviceState) -> BlockDevice | None:
    try:
        device = BlockDevice.find(state.path)
    except UsageError:
        return None
    return device if device.size and device_id(device) == state.id else None


def _link_status(
    state: DeviceState, link: LinkState, tracking: Tracking | None, live: Words | None
) -> LinkStatus:
    cursor = link.cursor
    reason = resync_reason(state, link)
    pending = None
    if tracking is not None and live is not None:
        found = _pending(tracking, link, live)
        pending = min(bitmap.count(found) * state.granularity, state.size)
    return LinkStatus(
        target=link.target,
        name=link.name,
        epoch=cursor.epoch if cursor else None,
        point=cursor.time if cursor else None,
        consistency=cursor.consistency if cursor else None,
        lag_s=time.time() - cursor.time if cursor else None,
        pending_bytes=pending,
        state="initial" if cursor is None else "resync" if reason else "ready",
        reason=reason,
    )


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


def _warnings(store: Store, device: BlockDevice) -> list[str]:
    """Things that will work, but that the user would want to know."""
    found = []
    own = {part.number for part in (device, *device.partitions)}
    for place in (store.paths.lib, store.paths.run):
        with contextlib.suppress(OSError):
            number = place.stat().st_dev
            if (os.major(number), os.minor(number)) in own:
                found.append(f"{place} lies on {device.path}: each sync makes changes of its own")
    return found
