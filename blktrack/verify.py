"""Comparing a replica with its source, and repairing it."""

from __future__ import annotations

import numpy as np

from blktrack import extent
from blktrack.errors import Interrupted
from blktrack.observer import Observer
from blktrack.options import Options
from blktrack.report import VerifyReport
from blktrack.round import judge
from blktrack.ship.apply import ApplyStopped, finish
from blktrack.ship.copy import Mode, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.target import Target
from blktrack.state import Store
from blktrack.sync import sync
from blktrack.sysfs import BlockDevice
from blktrack.uevents import Watch


def verify(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> VerifyReport:
    """Compare every byte of the device with the replica; nothing is written, but that an increment
    which waits complete is applied first."""
    device = BlockDevice.find(path)
    try:
        finish(target, store.paths, stop=options.stop, observer=observer)
    except ApplyStopped as error:
        raise Interrupted(str(error), signum=options.signum, hint=error.hint) from error
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
