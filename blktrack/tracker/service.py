"""What a service unit does at boot and shutdown, for every tracked device or for one."""

from __future__ import annotations

from collections.abc import Callable

from blktrack.device import check
from blktrack.errors import BlktrackError, Busy
from blktrack.observer import NOBODY, Observer
from blktrack.probe import verdict
from blktrack.report import DeviceAction
from blktrack.state import DeviceState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation, rest
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.tracker import find_any, present
from blktrack.tracker.tracking import Gap
from blktrack.use import InUse

Work = Callable[[Store, DeviceState, BlockDevice, Observer], DeviceAction]


def stop(
    store: Store, path: str | None, observer: Observer = NOBODY, *, let_go: bool = False
) -> list[DeviceAction]:
    """Put devices that nobody uses to rest. All others are tracked on until the host is off, or are
    let go: their generation ends, and with the last of them the programs leave the kernel."""
    return _each(store, path, _stop, observer, let_go=let_go)


def start(store: Store, path: str | None, observer: Observer = NOBODY) -> list[DeviceAction]:
    """Track on: in the same generation after a clean stop, in a new one after anything else."""
    return _each(store, path, _start, observer)


def _each(
    store: Store, path: str | None, work: Work, observer: Observer, *, let_go: bool = False
) -> list[DeviceAction]:
    """That one fails is told, and does not keep the others from their turn."""
    wanted: list[tuple[DeviceState, BlockDevice | None]]
    if path is None:
        wanted = [(state, None) for state in store.devices() if state.wanted]
    else:
        wanted = [find_any(store, path)]
    found = []
    for state, named in wanted:
        try:
            with hold(store, state.id, state.path, observer):
                state = store.device(state.id) or state
                done = _one(store, state, named, work, observer)
                found.append(_let_go(store, state, done) if let_go else done)
        except Busy as error:
            found.append(DeviceAction(state.path, "busy", str(error), error.hint))
        except BlktrackError as error:
            found.append(DeviceAction(state.path, "failed", str(error), error.hint))
    return found


def _one(
    store: Store, state: DeviceState, named: BlockDevice | None, work: Work, observer: Observer
) -> DeviceAction:
    """What was done with a device that is held, or why it could not be.

    named -- by the user, who may know it by another name than the one it was tracked by: those of
    NVMe and SCSI disks change from boot to boot.
    """
    try:
        if device := (named if named and named.size else None) or present(state):
            return work(store, state, device, observer)
    except BlktrackError as error:
        return DeviceAction(state.path, "failed", str(error), error.hint)
    return DeviceAction(
        state.path,
        "absent",
        "no device with its identity is there",
        hint="connect it; if it is gone for good, blktrack untrack it",
    )


def _let_go(store: Store, state: DeviceState, done: DeviceAction) -> DeviceAction:
    """What is not at rest, or still has a slot although its generation has ended."""
    if state.generation and not state.resting:
        generation.end(store, state, f"it was let go: {done.reason}")
        done = DeviceAction(done.device, "let go", done.reason)
    generation.detach(store, state)
    return done


def _stop(
    store: Store, state: DeviceState, device: BlockDevice, observer: Observer
) -> DeviceAction:
    if state.resting:
        return DeviceAction(device.path, "stopped", "it was already")
    observer.phase(f"putting {device.path} to rest", 0)
    try:
        with open_tracking(store, state, device) as tracking:
            rest.put_to_rest(tracking)
    except InUse as error:
        state.in_use = str(error)
        store.save_device(state)
        return DeviceAction(
            device.path,
            "in use",
            str(error),
            hint="it is tracked on; end what uses it and run this again before the host goes down, "
            "or its next syncs are resyncs",
        )
    except Gap:
        return DeviceAction(device.path, "gap", state.doubts[-1].reason if state.doubts else "")
    return DeviceAction(device.path, "stopped", "")


def _start(
    store: Store, state: DeviceState, device: BlockDevice, observer: Observer
) -> DeviceAction:
    resting = state.resting
    observer.phase(f"tracking {device.path} on", 0)
    verdict.check_anew(store, state, device, observer)
    try:
        open_tracking(store, state, device).close()
    except Gap:
        check(device)
        generation.begin(store, device, state.granularity or None, observer)
        return DeviceAction(device.path, "began", state.doubts[-1].reason if state.doubts else "")
    return DeviceAction(device.path, "resumed" if resting else "tracking", "")
