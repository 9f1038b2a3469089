"""Opening a tracked device, whatever it was through: at rest, or of another size by now."""

from __future__ import annotations

from contextlib import AbstractContextManager

from blktrack import durable
from blktrack.observer import NOBODY, Observer
from blktrack.state import DeviceState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.growth import grow
from blktrack.tracker.rest import resume
from blktrack.tracker.tracking import Tracking

PATIENCE = 30.0  # seconds


def hold(
    store: Store,
    state_id: str,
    path: str,
    observer: Observer = NOBODY,
    *,
    wait: float = PATIENCE,
) -> AbstractContextManager[None]:
    """The device's lock: taken for as long as a swap and merge take, so waiting is the answer."""
    return durable.lock(
        store.run(state_id) / "lock", what=f"device {path}", wait=wait, observer=observer
    )


def open_tracking(store: Store, state: DeviceState, device: BlockDevice) -> Tracking:
    """The tracking of a device at its present size. Gap, recorded, as Tracking."""
    if state.resting:
        resume(store, state, device)
    tracking = Tracking(store, state, device)
    if not tracking.grown:
        return tracking
    with tracking:
        grow(tracking)
    return Tracking(store, state, device)
