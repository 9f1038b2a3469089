"""One round of one link, whoever receives it: drain, plan, capture, commit.

The device's lock is held for the time of a swap only. What was begun and not committed is finished
by the next round: see `state`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blktrack import crash, extent
from blktrack.capture import Source, capture
from blktrack.errors import CopyFailed, NotTracked, ResyncNeeded
from blktrack.extent import ExtentArray
from blktrack.observer import Observer
from blktrack.options import Options
from blktrack.point import Point
from blktrack.probe import verdict
from blktrack.quiesce.find import file_systems
from blktrack.quiesce.freeze import Freeze
from blktrack.rates import Rates
from blktrack.ship.copy import Copied, Mode, copy
from blktrack.ship.endpoint import Endpoint, open_end
from blktrack.state import DeviceState, Doubt, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation
from blktrack.tracker.course import Course
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.tracking import Gap, Swap, Tracking
from blktrack.units import format_size


@dataclass(frozen=True)
class Plan:
    """What one round has to do."""

    mode: str  # as in SyncReport
    reason: str
    swap: Swap
    extents: ExtentArray


@dataclass
class Shipped:
    """What became of a plan. Bytes are those of all rounds of its capture."""

    point: Point
    rounds: int
    read: ExtentArray  # all that was read, coalesced
    different: ExtentArray  # in a resync, what was not the same on the replica
    bytes_written: int
    bytes_zeroed: int
    freeze_s: float


@dataclass
class Round(ABC):
    """One round of one link. `number` is the device's id."""

    store: Store
    device: BlockDevice
    number: str
    link: LinkState
    options: Options

    @abstractmethod
    def mode(self, state: DeviceState) -> tuple[str, str]:
        """How to bring the receiver on, as in SyncReport, and why if not the usual way."""

    @abstractmethod
    def has_part(self) -> bool:
        """Whether the receiver still has what an interrupted round brought to it in place."""

    @abstractmethod
    def ship(self, plan: Plan, sets: LinkSets, observer: Observer) -> Shipped:
        """Capture what is planned into the receiver."""

    def committed(self) -> Point | None:
        """The point that the receiver says to be at; None if at none, or if it cannot be asked."""
        return None

    def stage_id(self) -> str | None:
        """The id of the unsealed stage that the receiver kept and that this round goes on with; ""
        if it kept none, None where no stage outlives its round."""
        return None

    def stage_mark(self) -> int:
        """How much of that stage the receiver has, as it was told of before."""
        return 0

    @property
    def read_limit(self) -> Rates:
        """Bytes of the source to read per second."""
        return self.options.limit

    @property
    def checkpoint_bytes(self) -> int | None:
        """After how many bytes `durable` of a capture is told; None: now and then."""
        return None

    @property
    def course(self) -> Course:
        return Course(self.store, self.number, self.link)

    @property
    def writes(self) -> list[Path]:
        """What is written to on the way, and so cannot be frozen meanwhile."""
        return [self.store.paths.run, self.store.paths.lib]

    def prepare(self, observer: Observer) -> tuple[Plan, LinkSets]:
        """Close the epoch and decide what to ship. A gap begins a new generation here."""
        link = self.link
        with hold(self.store, self.number, self.device.path, observer):
            state = self.store.device(self.number)
            if state is None or not state.wanted:
                raise NotTracked(
                    f"{self.device.path} is no longer tracked",
                    hint=f"run blktrack track {self.device.path} first",
                )
            tracking, swap = self._drain(state, observer)
            with tracking:
                arrived = self.course.catch_up(self.committed(), tracking.state.generation)
                mode, reason = self.mode(tracking.state)
                filled = link.phase == mode and link.filled == tracking.state.generation
                resumed = filled and self.has_part()
                sets = None
                try:
                    sets = LinkSets(tracking, link)
                except FileNotFoundError:
                    resumed = False
                    if mode == "incremental":
                        mode, reason = "resync", "its pending set is gone"
                if mode == "resync" and self.options.no_resync:
                    raise ResyncNeeded(
                        f"{link} needs a resync: {reason}", hint="run it without --no-resync"
                    )
                if sets is None:
                    # Known before it has sets: none are left behind that nobody looks at.
                    self.store.save_link(self.number, link)
                    sets = LinkSets(tracking, link, create=True)
                if link.settles:  # more is taken than was sent
                    link.settles = False
                    self.store.save_link(self.number, link)
                if arrived:
                    sets.all_shipped()
                self.course.go_on(self.stage_id(), sets, self.stage_mark())
                if mode == "incremental" or resumed:
                    extents = sets.take()
                else:
                    sets.fill()
                    extents = sets.extents()
                    link.phase, link.filled = mode, tracking.state.generation
                    link.reason, link.stage = reason, ""
                    if mode == "resync":
                        Doubt.add(link.doubts, link.filled, reason)
                    self.store.save_link(self.number, link)
                    crash.point("fill-recorded")
                sets.watch()
        # Under a freeze more is going to change: that has to be staged.
        if mode == "incremental" and self.options.consistency != "filesystem":
            changed = len(extents) or len(sets.held_extents())
            mode = mode if changed else "nothing"
        return Plan(mode, reason, swap, extents), sets

    def _drain(self, state: DeviceState, observer: Observer) -> tuple[Tracking, Swap]:
        """The tracking just after a swap; after a gap, that of a new generation."""
        verdict.check_anew(self.store, state, self.device, observer)
        with contextlib.ExitStack() as stack:
            try:
                tracking = stack.enter_context(open_tracking(self.store, state, self.device))
                swap = tracking.drain()
            except Gap as gap:
                if self.options.no_resync and self.link.cursor is not None:
                    raise ResyncNeeded(
                        f"tracking has a gap: {gap}", hint="run it without --no-resync"
                    ) from gap
                observer.phase(f"tracking begins anew: {gap}", 0)
            else:
                stack.pop_all()
                return tracking, swap
        state = generation.begin(self.store, self.device, state.granularity or None, observer)
        tracking = Tracking(self.store, state, self.device)
        return tracking, tracking.drain()

    def capture(
        self,
        plan: Plan,
        sets: LinkSets,
        observer: Observer,
        end: Endpoint,
        *,
        durable: Callable[[ExtentArray], None] | None = None,
        compare: bool = False,
        blank: bool = False,
        kept: str = "the replica is at its point",
    ) -> Shipped:
        """Read rounds into `end` until the point asked for is reached.

        durable -- told now and then of what is durable there, and need not be shipped again.
        compare -- it has most of what is planned: only what differs is written.
        blank -- all of it reads as zeroes.
        kept -- what the operator is told of the receiver if it is not reached.
        """
        copies: list[Copied] = []
        frozen: list[Freeze] = []

        def freeze() -> Freeze | None:
            freezing = self._freeze(observer)
            frozen.extend([freezing] if freezing else [])
            return freezing

        def show(count: int) -> None:
            # What shows it may write to a log on a file system that is frozen.
            if not frozen:
                observer.done(count)

        observer.phase(plan.mode, extent.total(plan.extents))
        with open_end(self.device.path) as source, contextlib.ExitStack() as after:
            after.callback(_tell, frozen, observer)

            def read(extents: ExtentArray, ended: Callable[[], None]) -> None:
                if copies and not frozen:
                    size = extent.total(extents)
                    number = len(copies) + 1
                    observer.phase(f"round {number}: {format_size(size)} changed meanwhile", size)
                copied = copy(
                    source,
                    end,
                    extents,
                    mode=Mode.REPAIR if compare and not copies else Mode.COPY,
                    granularity=max(sets.granularity, 4096),
                    progress=show,
                    checkpoint=durable,
                    read_done=ended,
                    checkpoint_bytes=self.checkpoint_bytes,
                    stop=self.options.stop,
                    limit=self.read_limit,
                    known_zero=blank and not copies,
                )
                copies.append(copied)
                judge(plan.mode, copied, self.device.path, self.link, self.options, kept=kept)

            found = capture(
                Source(self.store, self.device, self.number, sets),
                plan.swap,
                plan.extents,
                read,
                consistency=self.options.consistency,
                freeze=freeze,
                cap=self.options.cap,
            )
        if frozen:
            observer.phase("thawed", 0)
        swap = found.swap
        return Shipped(
            Point(swap.epoch, swap.generation, swap.time, found.consistency),
            found.rounds if len(found.read) else 0,
            found.read,
            copies[0].different if copies else extent.empty(),
            sum(copied.bytes_written for copied in copies),
            sum(copied.bytes_zeroed for copied in copies),
            found.freeze_s,
        )

    def _freeze(self, observer: Observer) -> Freeze | None:
        """The file systems of the source, to be frozen; None if there is nothing to freeze, or if
        it is not wanted. Refused."""
        options = self.options
        wanted = options.consistency == "filesystem"
        if not wanted and not (options.freeze and file_systems(self.device)):
            return None
        return Freeze(
            self.device,
            partial(file_systems, self.device),
            lenient=not wanted,
            must_write=self.writes,
            cap=options.cap,
            pre=options.pre,
            post=options.post,
            tell=lambda phase: observer.phase(phase, 0),
        )

    def commit(self, point: Point, sets: LinkSets) -> None:
        """The receiver is there: the link follows, then what it no longer has to ship goes."""
        crash.point("commit-replica")
        self.link.move_to(point)
        self.store.save_link(self.number, self.link)
        crash.point("commit-link")
        sets.all_shipped()
        crash.point("commit-sets")


def _tell(frozen: list[Freeze], observer: Observer) -> None:
    for freeze in frozen:
        for warning in freeze.warnings:
            observer.warn(warning)


def judge(
    what: str,
    copied: Copied,
    path: str,
    receiver: object,
    options: Options,
    *,
    kept: str = "",
) -> None:
    """An incomplete copy is no point: say what is missing, and what became of the receiver."""
    kept = f"{kept}; " if kept else ""
    if len(copied.failed):
        places = extent.to_list(copied.failed)
        shown = ", ".join(str(place) for place in places[:4])
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        raise CopyFailed(
            f"{path} could not be read at {shown}{more} "
            f"({format_size(extent.total(copied.failed))})",
            hint=f"{kept}these extents stay pending: check the disk, try again",
        )
    if copied.interrupted:
        raise options.interrupted(
            f"{what} of {path} and {receiver} was interrupted", f"{kept}run it again to go on"
        )
