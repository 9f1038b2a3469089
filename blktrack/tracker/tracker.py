"""Finding, tracking and untracking devices; what `status` and `extents` tell."""

from __future__ import annotations

import contextlib
import os

from blktrack.device import device_id, source
from blktrack.errors import NotTracked, Refused, UsageError
from blktrack.observer import NOBODY, Observer
from blktrack.report import TrackReport
from blktrack.state import DeviceState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.tracking import Gap
from blktrack.units import format_size


def find(store: Store, path: str) -> tuple[DeviceState, BlockDevice]:
    """A device that the user asked to track. NotTracked otherwise."""
    device = source(path)
    state = store.device(device_id(device))
    if state is None or not state.wanted:
        raise NotTracked(f"{path} is not tracked", hint=f"run blktrack track {path} first")
    return state, device


def track(
    store: Store, path: str, granularity: int | None, observer: Observer = NOBODY
) -> TrackReport:
    """Attach to a device; one that is tracked soundly is left as it is."""
    device = source(path)
    number = device_id(device)
    if granularity:
        generation.check_granularity(granularity, device)
    with hold(store, number, path, observer):
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
            state = generation.begin(store, device, granularity or kept, observer)
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


def untrack(store: Store, path: str, observer: Observer = NOBODY) -> None:
    """Detach. What links had to ship is forgotten, so their next sync will be a resync."""
    state, _ = find_any(store, path)
    with hold(store, state.id, path, observer):
        generation.end(store, state, "it was untracked")
        generation.detach(store, state)
        store.drop_rest(state.id)
        state.wanted = False
        store.save_device(state)


def wanted_devices(store: Store) -> list[BlockDevice]:
    """Every tracked device that is there."""
    found = [present(state) for state in store.devices() if state.wanted]
    return [device for device in found if device]


def find_any(store: Store, path: str) -> tuple[DeviceState, BlockDevice | None]:
    """A device by path even if it is away or no longer a fit source."""
    hint = "blktrack status lists the devices that are"
    with contextlib.suppress(UsageError):
        device = BlockDevice.find(path)
        if state := store.device(device_id(device)):
            return state, device
        hint = f"run blktrack track {path} first"
    for state in store.devices():
        if state.path == path:
            return state, None
    raise NotTracked(f"{path} is not tracked", hint=hint)


def present(state: DeviceState) -> BlockDevice | None:
    try:
        device = BlockDevice.find(state.path)
    except UsageError:
        return None
    return device if device.size and device_id(device) == state.id else None


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
