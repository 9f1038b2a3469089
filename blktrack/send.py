"""Streams for a replica that is not known here: sent as a delta, committed when its user says so.

A stream starts at the link's cursor and leads to a point. Whether it arrived is not known, so it
moves nothing: until `commit` is told of it, every stream starts at the same point and has all that
changed since. So a stream that was lost costs another one and no resync.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from blktrack import crash, extent, history
from blktrack.durable import lock
from blktrack.errors import BlktrackError, Refused, UsageError
from blktrack.observer import Observer
from blktrack.options import Options
from blktrack.point import Point
from blktrack.report import CommitReport, SendReport
from blktrack.round import Plan, Round, Shipped
from blktrack.ship.delta import DeltaWriter, Header
from blktrack.ship.delta.end import DeltaEnd
from blktrack.ship.delta.pipe import Sink
from blktrack.ship.record import Origin
from blktrack.state import DeviceState, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.status import resync_reason
from blktrack.tracker.tracker import find, find_any
from blktrack.tracker.tracking import Gap
from blktrack.uevents import Watch

_MOST_SENT = 1000  # points that a link remembers, of streams that nobody told the fate of


@dataclass
class Stream(Round):
    """A round into a delta."""

    file: Sink
    level: int | None  # of zstd
    written: int = 0  # bytes of the stream

    def mode(self, state: DeviceState) -> tuple[str, str]:
        if self.options.full:
            return "initial", "a full copy was asked for"
        if self.link.cursor is None:
            return "initial", ""
        if reason := resync_reason(state, self.link):
            return "resync", reason
        return "incremental", ""

    def has_part(self) -> bool:
        return False

    @property
    def writes(self) -> list[Path]:
        found = super().writes
        # A pipe, or a file that is written to: the freeze would hold up both until its cap.
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{self.file.fileno()}"))
            if path.is_file():
                found.append(path)
        return found

    def ship(self, plan: Plan, sets: LinkSets, observer: Observer) -> Shipped:
        """Stream it all. The stream is on record before its end is written, and so before anybody
        can commit it."""
        writer = DeltaWriter(self.file, self._header(plan), level=self.level)
        crash.point("send-begun")
        end = DeltaEnd("the stream", writer)
        kept = "nothing is committed"
        shipped = self.capture(plan, sets, observer, end, kept=kept)
        link = self.link
        link.sent = [*link.sent, shipped.point][-_MOST_SENT:]
        link.settles = True
        self.store.save_link(self.number, link)
        crash.point("send-recorded")
        writer.end(shipped.point, rounds=shipped.rounds)
        self.written = writer.written
        return shipped

    def _header(self, plan: Plan) -> Header:
        state = self.store.device(self.number)
        assert state is not None
        return Header(
            link=self.link.id,
            source=Origin.of(self.device, plan.swap.generation),
            granularity=state.granularity,
            base=self.link.cursor if plan.mode in ("incremental", "nothing") else None,
            time=time.time(),
        )


def send(
    store: Store,
    path: str,
    name: str,
    file: Sink,
    *,
    options: Options,
    observer: Observer,
    level: int | None = None,
) -> SendReport:
    """Write a delta from the link's cursor to a point of the device at `path`; all of it the first
    time, and after a doubt. A link that is not known is made.

    After any error the stream is cut off, and no receiver takes it.
    """
    state, device = find(store, path)
    kept = options.history
    with history.recorded(
        store, state.id, "send", link=name, keep=kept, warn=observer.warn
    ) as record:
        link = find_link(store, state.id, name) or LinkState(str(uuid.uuid4()), name, "")
        report = _send(Stream(store, device, state.id, link, options, file, level), observer)
        record(report)
    return report


def _send(current: Stream, observer: Observer) -> SendReport:
    begun = time.monotonic()
    store, number, link = current.store, current.number, current.link
    with lock(store.link_lock(number, link.id), what=str(link)):
        link = current.link = find_link(store, number, link.name) or link  # as it is now
        try:
            plan, sets = current.prepare(observer)
            with sets, Watch(current.options.stop, current.device, None):
                shipped = current.ship(plan, sets, observer)
        except Gap as gap:
            raise BlktrackError(
                f"the stream was cut off: {gap}",
                hint="what was sent will be refused; send again, which may have to send all of it",
            ) from gap
    return SendReport(
        link=link.name,
        mode=plan.mode,
        reason=plan.reason,
        base=link.cursor.epoch if link.cursor and plan.mode in ("incremental", "nothing") else None,
        epoch=shipped.point.epoch,
        point=shipped.point.time,
        consistency=shipped.point.consistency,
        rounds=shipped.rounds,
        extents=len(shipped.read),
        bytes_changed=extent.total(shipped.read),
        bytes_shipped=shipped.bytes_written,
        bytes_zeroed=shipped.bytes_zeroed,
        bytes_wire=current.written,
        freeze_s=shipped.freeze_s,
        duration_s=time.monotonic() - begun,
    )


def commit(store: Store, path: str, name: str, epoch: int) -> CommitReport:
    """The receiver of a stream has committed `epoch`: the next one starts there."""
    state, device = find_any(store, path)
    known = find_link(store, state.id, name)
    if known is None:
        raise UsageError(f"{path} has no link {name}", hint="see blktrack status")
    with lock(store.link_lock(state.id, known.id), what=str(known)):
        link = find_link(store, state.id, name) or known
        point = next((point for point in reversed(link.sent) if point.epoch == epoch), None)
        if point is None:
            _refuse(link, epoch)
        else:
            settles = link.settles and point == link.sent[-1]
            link.move_to(point)
            store.save_link(state.id, link)
            crash.point("send-committed")
            if settles and device is not None:
                _settle(store, state.id, device, link, point)
        assert link.cursor is not None
        cursor = link.cursor
    return CommitReport(link.name, cursor.epoch, cursor.time, cursor.consistency)


def _refuse(link: LinkState, epoch: int) -> None:
    """Unless it was told before."""
    if link.cursor is not None and link.cursor.epoch == epoch:
        return
    where = f"is at epoch {link.cursor.epoch}" if link.cursor else "is at no point"
    waiting = ", ".join(str(point.epoch) for point in link.sent[-4:]) or "none"
    raise Refused(
        f"no stream of {link} leads to epoch {epoch}: it {where}, and sent were: {waiting}",
        hint="commit the epoch that blktrack recv named, or send anew",
    )


def _settle(store: Store, number: str, device: BlockDevice, link: LinkState, point: Point) -> None:
    """All that was taken from the link's sets is there. Where they cannot be reached it is sent
    once more."""
    with hold(store, number, device.path), contextlib.suppress(Gap, FileNotFoundError):
        state = store.device(number)
        if state is None or state.generation != point.generation:
            return
        with open_tracking(store, state, device) as tracking:
            if tracking.state.generation == point.generation:
                with LinkSets(tracking, link) as sets:
                    sets.all_shipped()


def find_link(store: Store, number: str, name: str) -> LinkState | None:
    return next((link for link in store.links(number) if link.name == name), None)
