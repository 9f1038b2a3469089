"""Bringing a replica to a point of its source, and comparing the two.

Locks are taken in this order: the replica, and with it the link, for the whole sync; the device for
the time of a swap.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import numpy as np

from blktrack import extent
from blktrack.errors import CopyFailed, Interrupted
from blktrack.point import Point
from blktrack.report import SyncReport, VerifyReport
from blktrack.round import Observer, Options, Round
from blktrack.ship.copy import Copied, Mode, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.replica import Replica
from blktrack.ship.target import Target
from blktrack.state import LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.tracker import find
from blktrack.uevents import Watch
from blktrack.units import format_size


def sync(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> tuple[SyncReport, Copied]:
    """Bring the replica at `target` to a point of the device at `path`."""
    begun = time.monotonic()
    state, device = find(store, path)
    known = _find_link(store, state.id, target)
    with Replica.open(
        target,
        source=device,
        link=known.id if known else None,
        paths=store.paths,
        force=options.force,
    ) as replica:
        # Read anew: whoever had the replica until now may have moved the cursor.
        link = _find_link(store, state.id, target) or _new_link(store, state.id, target, replica)
        current = Round(store, device, state.id, link, replica, options)
        plan, sets = current.prepare()
        with sets, Watch(options.stop, device, replica.target.device, writable=True):
            observer.phase(plan.mode, extent.total(plan.extents))
            level, copied = current.ship(plan, sets, observer)
            _judge(plan.mode, copied, path, target, options)
            point = Point(plan.swap.epoch, plan.swap.generation, plan.swap.time, level)
            current.commit(point, sets)
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


def _find_link(store: Store, number: str, target: str) -> LinkState | None:
    return next((link for link in store.links(number) if link.target == target), None)


def _new_link(store: Store, number: str, target: str, replica: Replica) -> LinkState:
    base = name = Path(target).name
    taken = {link.name for link in store.links(number)}
    number_of = count(2)
    while name in taken:
        name = f"{base}-{next(number_of)}"
    return LinkState(replica.link, name, target)


def _judge(mode: str, copied: Copied, path: str, target: str, options: Options) -> None:
    """An incomplete copy is no point: say what is missing. What was shipped stays shipped."""
    if len(copied.failed):
        places = extent.to_list(copied.failed)
        shown = ", ".join(str(place) for place in places[:4])
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        raise CopyFailed(
            f"{path} could not be read at {shown}{more} "
            f"({format_size(extent.total(copied.failed))})",
            hint="the rest was dealt with; these extents stay pending: check the disk, try again",
        )
    if copied.interrupted:
        raise Interrupted(
            f"{mode} of {path} and {target} was interrupted",
            signum=options.signum,
            hint="what was done is kept: run it again to go on from there",
        )


def verify(
    store: Store, path: str, target: str, options: Options, observer: Observer
) -> VerifyReport:
    """Compare every byte of the device with the replica; nothing is written."""
    device = BlockDevice.find(path)
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
        _judge("verify", copied, path, target, options)
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
