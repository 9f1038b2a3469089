"""Comparing a replica with its source, and repairing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from blktrack import extent
from blktrack.observer import Observer
from blktrack.options import Options
from blktrack.rates import UNLIMITED
from blktrack.report import VerifyReport
from blktrack.round import judge
from blktrack.ship.address import Address, is_remote
from blktrack.ship.apply import ApplyStopped, finish
from blktrack.ship.copy import Mode, copy
from blktrack.ship.endpoint import Endpoint, open_end
from blktrack.ship.remote import RemoteReplica
from blktrack.ship.target import Target
from blktrack.state import Store
from blktrack.sync import sync, wire_of
from blktrack.sysfs import BlockDevice
from blktrack.uevents import Watch


def verify(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> VerifyReport:
    """Compare every byte of the device with the replica; nothing is written, but that an increment
    which waits complete is applied first."""
    device = BlockDevice.find(path)
    with (
        options.limited(),
        _opened(store, device, target, options, observer) as (replica, other),
        Watch(options.stop, device, other),
        open_end(device.path) as source,
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
            limit=UNLIMITED if is_remote(target) else options.limit,
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


@contextlib.contextmanager
def _opened(
    store: Store, device: BlockDevice, target: str, options: Options, observer: Observer
) -> Iterator[tuple[Endpoint, BlockDevice | None]]:
    """The replica to be read, and the device that it is."""
    if is_remote(target):
        with RemoteReplica.open(
            Address.parse(target),
            source=device,
            link=None,
            wire=wire_of(options),
            stop=options.stop,
            writable=False,
            observer=observer,
        ) as remote:
            yield remote.end, None
        return
    try:
        finish(target, store.paths, stop=options.stop, observer=observer)
    except ApplyStopped as error:
        raise options.interrupted(str(error), error.hint) from error
    other = Target.find(target).device
    with open_end(target) as replica:
        yield replica, other


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
