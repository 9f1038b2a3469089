"""A round into a replica: how to bring it on, and the way there.

An increment is staged beside the replica and applied as a whole; a full copy or a resync, which
have no point to protect, go straight into it. So does an increment that cannot be staged.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blktrack import crash, extent
from blktrack.errors import NoPoint, Refused
from blktrack.extent import ExtentArray
from blktrack.observer import Observer
from blktrack.point import Point
from blktrack.quiesce.find import devices_below
from blktrack.rates import UNLIMITED, Rates
from blktrack.round import Plan, Round, Shipped
from blktrack.ship.record import State
from blktrack.ship.remote import FarStage, RemoteReplica
from blktrack.ship.replica import Replica
from blktrack.ship.room import Cramped, NoRoom, check_room_for, room
from blktrack.ship.stage import Stage
from blktrack.state import DeviceState
from blktrack.tracker.link import LinkSets
from blktrack.tracker.status import resync_reason

_DURABLE = "writing back what was copied"
_IN_FLIGHT = 16 << 20  # bytes after which the far side is asked to make durable what it has


@dataclass
class Replication(Round):
    """A round into a replica."""

    replica: Replica | RemoteReplica

    @contextlib.contextmanager
    @abstractmethod
    def staging(
        self, plan: Plan, sets: LinkSets, observer: Observer
    ) -> Iterator[tuple[Stage | FarStage, Callable[[ExtentArray], None] | None]]:
        """A stage for an increment, and who is told of what is durable in it."""

    @property
    @abstractmethod
    def can_stage(self) -> bool:
        """Whether an increment can be staged beside the replica."""

    def mode(self, state: DeviceState) -> tuple[str, str]:
        record, options = self.replica.record, self.options
        # What was asked for may have been done by this run, which did not hear of it.
        done = options.announced is not None and self.link.cursor == options.announced
        if options.full and not done:
            return "initial", "a full copy was asked for"
        if record is None:
            return "initial", "the replica is new" if self.link.cursor else ""
        if self.link.phase == "initial":
            return "initial", self.link.reason
        if options.resync and not done:
            return "resync", options.resync
        if self.replica.changed:
            return "resync", f"the replica is not as it was left: {self.replica.changed}"
        if self.link.cursor is None:
            return "resync", "the replica was made by a link that is not known here"
        if reason := resync_reason(state, self.link):
            return "resync", reason
        if record.point != self.link.cursor:
            return "resync", "the replica is not at the point that it was brought to"
        return "incremental", ""

    def _announce(self, point: Point) -> None:
        self.options.announced = point
        self.course.announce(point)

    def committed(self) -> Point | None:
        record = self.replica.record
        return record.point if record and self.replica.has_point else None

    @abstractmethod
    def apply(self, stage: Stage | FarStage, observer: Observer) -> None:
        """Bring the replica to the point of a sealed stage."""

    def depart(self) -> None:
        """The replica is going to be taken from its point. One of this host says so itself."""

    def has_part(self) -> bool:
        unfinished = self.replica.existing_state is State.UNFINISHED
        return unfinished and not self.replica.changed

    @property
    def writes(self) -> list[Path]:
        return [*super().writes, *self.replica.writes]

    def ship(self, plan: Plan, sets: LinkSets, observer: Observer) -> Shipped:
        """Capture the planned extents, and bring the replica to the point that was reached.

        No bit of an increment is forgotten before the commit: all that a replica at its old point
        lacks stays pending, whether it is restored to it or left half-way from it.
        """
        crash.point("ship-planned")
        increment, replica = plan.mode == "incremental", self.replica
        if plan.mode == "nothing":
            shipped = self.capture(plan, sets, observer, replica.end)
            self._announce(shipped.point)
            replica.commit(shipped.point)
        elif increment and self.can_stage:
            with self.staging(plan, sets, observer) as (stage, durable):
                shipped = self.capture(plan, sets, observer, stage.end, durable=durable)
                observer.phase(_DURABLE, 0)
                self._announce(shipped.point)
                whole = extent.union(shipped.read, sets.held_extents())
                stage.seal(whole, shipped.point)
                observer.phase("apply", extent.total(whole))
                self.apply(stage, observer)
        else:
            self.depart()
            replica.begin(State.APPLYING if increment else State.UNFINISHED, plan.swap.generation)
            crash.point("ship-begun")
            # Another round of this run, after a gap, finds what this one wrote.
            blank, replica.blank = replica.blank, False
            try:
                shipped = self.capture(
                    plan,
                    sets,
                    observer,
                    replica.end,
                    durable=None if increment else sets.shipped,
                    compare=plan.mode == "resync",
                    blank=blank,
                    kept="the replica is unfinished",
                )
            except (NoPoint, Refused) as error:
                error.hint += "; until then the replica, written in place, is at no point"
                raise
            observer.phase(_DURABLE, 0)
            self._announce(shipped.point)
            replica.commit(shipped.point)
        return shipped


@dataclass
class LocalReplication(Replication):
    """Into a replica of this host."""

    replica: Replica

    @property
    def can_stage(self) -> bool:
        """Unless it is asked not to, or the replica is on its way to a point already. Nor on the
        source itself: what is staged there would be part of the next increment, which would grow
        until it fills the source."""
        if self.options.in_place or self.replica.existing_state is not State.READY:
            return False
        return self.device.number not in devices_below(self.replica.folder)

    @contextlib.contextmanager
    def staging(
        self, plan: Plan, sets: LinkSets, observer: Observer
    ) -> Iterator[tuple[Stage, Callable[[ExtentArray], None] | None]]:
        """It is gone with the round, so nothing of it is told to be durable."""
        fits = room(
            self.replica.folder,
            self.device.path,
            plan.extents,
            stop=self.options.stop,
            limit=self.options.limit,
            observer=observer,
        )
        with fits, self.replica.stage() as stage:
            yield stage, None

    def apply(self, stage: Stage | FarStage, observer: Observer) -> None:
        assert isinstance(stage, Stage)
        self.replica.apply(stage, observer.done, self.options.stop)


@dataclass
class RemoteReplication(Replication):
    """Into a replica on another host. What is limited is the wire, and not the reading."""

    replica: RemoteReplica

    @property
    def read_limit(self) -> Rates:
        return UNLIMITED

    @property
    def checkpoint_bytes(self) -> int | None:
        return _IN_FLIGHT

    @property
    def can_stage(self) -> bool:
        """As of a replica of this host; whether it lies on the source is told by its keeper."""
        return not self.options.in_place and self.replica.has_point and self.replica.can_stage

    def stage_id(self) -> str | None:
        return self.replica.stage_id if self.can_stage else None

    def stage_mark(self) -> int:
        return self.replica.stage_mark

    @contextlib.contextmanager
    def staging(
        self, plan: Plan, sets: LinkSets, observer: Observer
    ) -> Iterator[tuple[FarStage, Callable[[ExtentArray], None] | None]]:
        """It outlives the round, and the next one goes on with it."""

        def durable(done: ExtentArray) -> None:
            self.course.mark(stage.end.mark)
            sets.staged(done)

        with self.replica.stage(self.link.stage, sets.size) as stage:
            self.course.stage_in(stage.id, sets)
            self._check_room(stage, plan.extents, sets.held_extents(), observer)
            yield stage, durable

    def _check_room(
        self, stage: FarStage, more: ExtentArray, held: ExtentArray, observer: Observer
    ) -> None:
        """NoRoom if `more` does not fit next to what the stage holds; Cramped if it does, and what
        was held with it, in an empty stage, which is made."""

        def check(extents: ExtentArray, free: int | None) -> None:
            check_room_for(
                extents,
                stage.folder,
                free,
                self.device.path,
                stop=self.options.stop,
                observer=observer,
            )

        try:
            check(more, stage.free)
        except NoRoom as error:
            if not len(held) or stage.free is None:
                raise
            check(extent.union(more, held), stage.free + extent.total(held))
            self.replica.stage("", self.device.size)
            raise Cramped(str(error)) from error

    def depart(self) -> None:
        self.course.depart()

    def apply(self, stage: Stage | FarStage, observer: Observer) -> None:
        assert isinstance(stage, FarStage)
        self.replica.apply(stage, observer.done)
