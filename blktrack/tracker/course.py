"""Where a link stands with its receiver when a round begins, whatever became of the one before.

Two things a round may not hear of, as its process died or the connection was lost: that its point
was committed, and that what it staged is still there. Both are asked for when the next one begins,
under the device's lock and before more is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from blktrack import crash
from blktrack.point import Point
from blktrack.state import LinkState, Store
from blktrack.tracker.link import LinkSets


@dataclass
class Course:
    """Of one link. `number` is the device's id. Every step is on record when its call returns."""

    store: Store
    number: str
    link: LinkState

    def catch_up(self, point: Point | None, generation: str) -> bool:
        """Follow a receiver that is ahead, as it is after a death between its commit and the
        link's. Whether nothing is left to ship of what was taken and staged until now.

        point -- where the receiver says to be; None: at none, or it cannot be asked.
        generation -- that of the tracking.

        All that was taken and staged when a point was announced is part of it, and nothing is
        added to that before this is called: what changed since is pending. To no other point is
        followed, though it be of the same generation and later: a source that was set back, or of
        which there are two, knows nothing of the changes that led there.
        """
        link = self.link
        if link.sealing is None:
            return False
        arrived = point == link.sealing and link.sealing.generation == generation
        if arrived:
            link.move_to(link.sealing)
        else:
            link.sealing = None
        self._save()
        crash.point("catch-up-recorded")
        return arrived

    def go_on(self, stage: str | None, sets: LinkSets, mark: int = 0) -> None:
        """Have what is held shipped, unless the receiver still holds it.

        stage -- the id of the unsealed stage that it has and that this round goes on with; "" if
            there is none, None if this round will have none.
        mark -- how much of it there is: with less than was told before, it holds older bytes, or
            none, where it held those that count.
        """
        if stage is not None:
            sets.make_held()
        if not stage or stage != self.link.stage or mark < self.link.mark:
            sets.give_back()
            if self.link.stage:
                self.link.stage = ""
                self._save()

    def stage_in(self, stage: str, sets: LinkSets) -> None:
        """From now on `sets.staged` is told of what is durable in the receiver's stage of this id.

        ValueError if what is held is in another one.
        """
        if stage == self.link.stage:
            return
        if len(sets.held_extents()):
            raise ValueError(f"what is held is in the stage {self.link.stage!r}, not in {stage!r}")
        self.link.stage, self.link.mark = stage, 0
        self._save()
        crash.point("stage-recorded")

    def mark(self, mark: int) -> None:
        """So much of the stage is durable by now: to be told before `sets.staged` is."""
        self.link.mark = mark
        self._save()

    def depart(self) -> None:
        """The receiver, which nobody can look at later, is going to be taken from its point."""
        if not self.link.away:
            self.link.away = True
            self._save()
            crash.point("away-recorded")

    def announce(self, point: Point) -> None:
        """The receiver is going to be asked to commit this point."""
        self.link.sealing = point
        self._save()
        crash.point("sealing-recorded")

    def _save(self) -> None:
        self.store.save_link(self.number, self.link)
