"""A sealed stage becomes the replica: all of it, now or at the next touch.

The steps: the record says APPLYING, from which point and to which; the staged extents come into
the replica; they are made durable; the record says READY at the new point; the stage is dropped.
A death before the first leaves the replica at its old point, with the stage sealed: the next touch
begins here. After the first the next touch does all of it again, from a stage that nothing changes,
so it does not matter how far the dead one came. After the record is READY the stage leads from a
point that the replica has left, and is dropped.

It may take long, and a signal ends it: `stop` is such a death, only that it is told of.

A stage goes only into the very bytes that it was made for. While the record is READY the replica's
seal tells whether others wrote to it since; then the stage is dropped, and a resync is due.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace

from blktrack import crash
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Refused
from blktrack.extent import total
from blktrack.observer import NOBODY, Observer
from blktrack.point import Point
from blktrack.ship.claim import take
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import FileEnd
from blktrack.ship.header import LOST, StageDamaged
from blktrack.ship.pack import ZERO, Unpacker
from blktrack.ship.place import RECORD, Place, folder_of, lock_of
from blktrack.ship.record import Origin, Record, State
from blktrack.ship.reflink import share
from blktrack.ship.stage import Stage, discard, is_due
from blktrack.ship.target import Target, check_idle
from blktrack.units import format_size

_WIDE = 1 << 20  # bytes of zeroes that are punched without a look


class ApplyStopped(BlktrackError):
    """`stop` was set before all of a stage was in the replica, whose next user goes on."""


def apply(
    place: Place,
    stage: Stage,
    source: Origin,
    *,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Bring the replica to the point of a sealed stage, and drop the stage.

    ApplyStopped if `stop` was set meanwhile, CopyFailed where the replica cannot be written: it is
    to be done again. StageDamaged where the pack cannot be read: only a resync helps.
    """
    assert stage.point is not None
    if not isinstance(place.end, FileEnd) and place.end.size < stage.size:
        raise Refused(
            f"{place.target.name} is too small: {format_size(place.end.size)} for an increment of a"
            f" source of {format_size(stage.size)}",
            hint="choose a replica at least as large as the source",
        )
    source = replace(source, size=stage.size)
    place.leave(stage.link, source, State.APPLYING, stage.base, stage.point)
    _bring(place, stage, progress, stop or threading.Event())
    crash.point("apply-copied")
    place.arrive(stage.link, source, stage.point)
    crash.point("apply-done")
    stage.drop()


def _bring(
    place: Place, stage: Stage, progress: Callable[[int], None] | None, stop: threading.Event
) -> None:
    index = stage.index
    every = stage.bytes
    if isinstance(place.end, FileEnd):
        index = share(stage.file, place.end, index, stop)
    # Large zeroes need not be looked at on their way.
    wide = (index[:, 2] == ZERO) & (index[:, 1] >= _WIDE)
    for start, length, _ in index[wide].tolist():
        place.end.zero(start, length)
    index = index[~wide]
    done = every - int(index[:, 1].sum())
    if progress is not None:
        progress(done)
    copied = copy(
        Unpacker(stage.file, index, stage.size),
        place.end,
        index[:, :2],
        progress=None if progress is None else lambda count: progress(done + count),
        stop=stop,
    )
    if len(copied.failed):
        places = format_size(total(copied.failed))
        raise StageDamaged(place.folder, f"{places} of it cannot be read ({stage.file.path})")
    if copied.interrupted:
        raise ApplyStopped(
            f"interrupted while an increment was brought into {place.target.name}",
            hint="it is half in, and all of it is kept beside: the next sync finishes that first",
        )


def settle(
    place: Place,
    changed: str,
    stop: threading.Event | None = None,
    observer: Observer = NOBODY,
) -> tuple[Point | None, str]:
    """Finish what an earlier run sealed for a replica, or drop it where it does not fit. What is
    kept for it unsealed is left to whoever goes on with it, or dropped where it does not fit.

    changed -- what happened to the replica since its record was written.

    The point that it was brought to by this, and why it is not what its record says: `changed`, or
    that it was left between two points and cannot be finished. ApplyStopped.
    """
    record = place.record
    assert record is not None
    begun = record.next is not None
    try:
        stage = Stage.find(place.folder, None if changed else record)
    except StageDamaged as error:
        if not begun:
            discard(place.folder)
        return None, changed or (f"{LOST}: {error.why}" if begun else "")
    if stage is None:
        return None, changed or (LOST if begun else "")
    with stage:
        fits = stage.leads_from(record)
        if fits and not changed:
            assert stage.point is not None
            point = stage.point
            try:
                source = replace(record.source, generation=point.generation)
                observer.phase("applying the increment of an earlier run", stage.bytes)
                apply(place, stage, source, progress=observer.done, stop=stop)
            except StageDamaged as error:
                return None, f"{LOST}: {error.why}"
            return point, ""
        if not begun:
            stage.drop()
            return None, changed
        return None, changed or f"{LOST}: another one is there"


def finish(
    name: str,
    paths: Paths,
    *,
    stop: threading.Event | None = None,
    observer: Observer = NOBODY,
) -> Record | None:
    """Bring a replica to the point that an earlier run sealed for it; its record, if it has one.

    For any command on the replica's side: the source need not be there. A replica for which nothing
    waits is not touched. Raises Refused, Busy, and BlktrackError if it is left between two points;
    ApplyStopped if `stop` was set meanwhile.
    """
    target = Target.find(name)
    folder = folder_of(target, paths)
    seen = Record.read(folder / RECORD)
    if seen is not None and seen.state is State.APPLYING and seen.next is None:
        raise BlktrackError(
            f"{name} is at no point: an increment that is written into it has not ended",
            hint="run blktrack sync: it goes on with that",
        )
    if seen is None or not target.exists or not (is_due(folder) or seen.next):
        return seen
    check_idle(target)
    with contextlib.ExitStack() as held:
        end, _ = take(target, lock_of(folder, paths), held, size=0, writable=True)
        place = Place(target, end, folder)
        place.record = Record.read(folder / RECORD)
        if place.record is None:
            return None
        _, changed = settle(place, place.changed(place.record), stop, observer)
        if place.record.next is not None:
            raise BlktrackError(
                f"{name} is at no point: {changed}",
                hint="run blktrack sync: it compares the replica with its source and repairs it",
            )
        return place.record
