"""A tracked device that has grown goes on in its generation: what is new of it counts as changed.

A second slot, with maps of the new size, is active before the old one is drained for the last time,
so every change is in one of them or in both. Until the device's record names the new slot, a death
leaves the old one in force, and the next command does all of this again.
"""

from __future__ import annotations

import numpy as np

from blktrack import bitmap, crash, durable
from blktrack.bitfile import BitFile
from blktrack.tracker import account
from blktrack.tracker.generation import check_memory, window_of
from blktrack.tracker.tracking import Tracking


def grow(tracking: Tracking) -> None:
    """Track all of a device; it has to be opened anew afterwards."""
    store, state, kernel = tracking.store, tracking.state, tracking.kernel
    assert kernel
    window = window_of(tracking.device, tracking.device.size, state.granularity)
    check_memory(
        tracking.device,
        window.geometry,
        hint="untrack it and track it with a larger --granularity; its replicas are then resynced",
    )
    with durable.lock(store.kernel_lock, what="the tracking programs", wait=30):
        for other in kernel.windows.slots(window.disk, window.start):
            if other != state.slot:  # left by a death in here
                kernel.remove(other)
        slot = kernel.add(window, settled=True)  # the old slot has what is in flight remembered
        maps = [planes.id for planes in kernel.planes(slot, window.geometry)]
        counts = None
        if account.known(tracking.epoch, state.slot) and account.available(tracking.device):
            counts = account.take(tracking.device, kernel.stats_reader(slot))
    crash.point("grow-added")
    tracking.drain()
    _widen(tracking, window.geometry.granules)
    crash.point("grow-widened")
    account.remember(tracking.epoch, slot, counts)
    store.save_epoch(state.id, tracking.epoch)
    crash.point("grow-accounted")
    old, state.slot, state.maps, state.size = state.slot, slot, maps, window.length
    store.save_device(state)
    crash.point("grow-recorded")
    with durable.lock(store.kernel_lock, what="the tracking programs", wait=30):
        kernel.remove(old)


def _widen(tracking: Tracking, granules: int) -> None:
    """Make room in all sets; every link has to ship what is new, the cut old granule included."""
    words = bitmap.words_for(granules)
    first = tracking.state.size // tracking.state.granularity
    sets = [tracking.store.run(tracking.state.id) / "settling"]
    for name in ("shipping", "held", "racing", "pending"):
        sets += tracking.store.link_files(tracking.state.id, name)
    for path in sets:
        BitFile.widen(path, words)
        if path.name == "pending":
            with BitFile(path, words) as pending:
                new = pending.reserve(np.arange(first // bitmap.BITS, words))
                bitmap.set_range(new, first, granules - first)
