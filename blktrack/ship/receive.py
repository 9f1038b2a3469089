"""A delta from anywhere becomes the next point of a replica, whole or not at all.

A replica that is at a point keeps it until the delta has come to its end, is found whole and is
durable beside it; then it is applied. Only a full copy for a replica without a point goes straight
into it. Nothing here needs the source, or what tracks it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np

from blktrack import extent
from blktrack.config import Paths
from blktrack.errors import Refused
from blktrack.extent import ExtentArray
from blktrack.observer import NOBODY, Observer
from blktrack.point import Point
from blktrack.report import RecvReport
from blktrack.ship.delta import DeltaInvalid, DeltaReader, Header, Kind
from blktrack.ship.delta.pipe import Source
from blktrack.ship.endpoint import DeviceEnd, Endpoint
from blktrack.ship.jail import Jail
from blktrack.ship.record import State
from blktrack.ship.replica import Replica

_GATHER = 1 << 16  # extents between two coalescings


def receive(
    file: Source,
    target: str,
    paths: Paths,
    *,
    force: bool = False,
    jail: Jail | None = None,
    observer: Observer = NOBODY,
) -> RecvReport:
    """Bring the replica at `target` to the point that a delta leads to.

    jail -- of which `target` was admitted: its limits hold.
    observer -- is told of the bytes of the stream in the phase that it is in, then of others.

    Raises DeltaError for a stream that is not a whole delta, Refused for a target that it does not
    fit, Busy. The replica is then as it was, but for an initial copy, which is unfinished.
    """
    reader = DeltaReader(file)
    header = reader.header
    if jail is not None:
        jail.check_size(target, header.size)
    with Replica.open(
        target, source=header.source, link=header.link, paths=paths, force=force, observer=observer
    ) as replica:
        _check_start(replica, header)
        frames = _Frames(reader, observer.done)
        if replica.has_point:
            with replica.stage(most=jail.most_staging if jail else None) as stage:
                extents = frames.into(stage.end, blocks=replica.end)
                if not force:
                    _check_forward(replica, reader.trailer.point)
                observer.phase("writing back what was received", 0)
                stage.seal(extents, reader.trailer.point)
                observer.phase("apply", extent.total(extents))
                replica.apply(stage, observer.done)
        else:
            replica.begin(State.UNFINISHED, header.source.generation)
            extents = frames.into(replica.end, blocks=replica.end)
            observer.phase("writing back what was received", 0)
            replica.commit(reader.trailer.point)
    trailer = reader.trailer
    return RecvReport(
        target=target,
        link=header.link,
        source=header.source.device,
        mode="initial" if header.base is None else "incremental",
        epoch=trailer.point.epoch,
        point=trailer.point.time,
        consistency=trailer.point.consistency,
        extents=len(extents),
        bytes_changed=extent.total(extents),
        bytes_shipped=trailer.counts.data_bytes,
        bytes_zeroed=trailer.counts.zero_bytes + trailer.counts.discard_bytes,
        bytes_wire=reader.offset,
    )


def _check_start(replica: Replica, header: Header) -> None:
    """Refused if an increment does not start where the replica is."""
    base, name, record = header.base, replica.target.name, replica.record
    if base is None:
        return
    full = "send all of it: blktrack send --full"
    if record is None:
        raise Refused(
            f"{name} is not a replica of {header.source.device} yet, and the delta starts at"
            f" epoch {base.epoch}",
            hint=full,
        )
    if replica.changed:
        raise Refused(f"{name} is not as it was left: {replica.changed}", hint=full)
    if record.state is not State.READY or record.point is None:
        raise Refused(f"{name} is at no point: what was written into it has not ended", hint=full)
    if record.point != base:
        at = record.point
        hint = full
        if at.generation == base.generation and at.epoch > base.epoch:
            sender = f"blktrack send {header.source.device} --link ... --commit {at.epoch}"
            hint = f"tell its sender ({sender}), then send again"
        raise Refused(
            f"the delta starts at epoch {base.epoch} of generation {base.generation[:8]}, {name} is"
            f" at epoch {at.epoch} of {at.generation[:8]}",
            hint=hint,
        )


def _check_forward(replica: Replica, point: Point) -> None:
    """Refused if a full copy is older than what is there."""
    at = replica.record.point if replica.record else None
    if at is not None and at.generation == point.generation and at.epoch > point.epoch:
        raise Refused(
            f"{replica.target.name} is at epoch {at.epoch}, and the delta is a full copy that leads"
            f" back to epoch {point.epoch}",
            hint="receive a later one, or --force to go back",
        )


class _Frames:
    """The frames of a delta on their way to an end."""

    def __init__(self, reader: DeltaReader, progress: Callable[[int], None]) -> None:
        self._reader = reader
        self._progress = progress
        self._covered = extent.empty()
        self._new = array("q")  # starts and lengths of the latest ones

    def into(self, end: Endpoint, *, blocks: Endpoint) -> ExtentArray:
        """Write them all; what they cover, once the delta is known to be whole and to make sense.

        blocks -- the replica, whose blocks an extent has to fit.
        """
        unit = blocks.align if isinstance(blocks, DeviceEnd) else 1
        for frame in self._reader:
            if (frame.start | frame.length) % unit:
                raise Refused(
                    f"{blocks.path} has blocks of {unit} bytes, and the delta an extent of"
                    f" {frame.start}+{frame.length}",
                    hint="use a file as the replica, or a device with smaller logical blocks",
                )
            if frame.kind is Kind.DATA:
                assert frame.data is not None
                end.write(frame.data, frame.start)
            else:
                end.zero(frame.start, frame.length)
            self._note(frame.start, frame.length)
            self._progress(self._reader.offset)
        self._reader.expect_end()
        self._check_whole()
        return self._covered

    def _note(self, start: int, length: int) -> None:
        new = self._new
        if new and new[-2] + new[-1] == start:
            new[-1] += length
            return
        new.extend((start, length))
        # Each time twice as many: the work stays in proportion to the frames.
        if len(new) >= 2 * max(_GATHER, len(self._covered)):
            self._coalesce()

    def _coalesce(self) -> None:
        new = np.array(self._new, dtype=np.int64).reshape(-1, 2)
        self._covered = extent.union(self._covered, new)
        self._new = array("q")

    def _check_whole(self) -> None:
        """DeltaInvalid if it leads back, or is a full copy with parts missing."""
        self._coalesce()
        header, point = self._reader.header, self._reader.trailer.point
        base = header.base
        if point.generation != header.source.generation:
            raise DeltaInvalid("it leads to a point of another generation than its source's")
        if base is not None and (point.generation != base.generation or point.epoch < base.epoch):
            raise DeltaInvalid(f"it leads from epoch {base.epoch} to {point.epoch}")
        if base is None and extent.total(self._covered) != header.size:
            missing = header.size - extent.total(self._covered)
            raise DeltaInvalid(f"it is a full copy, and {missing} bytes of it are missing")
