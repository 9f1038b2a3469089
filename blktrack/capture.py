"""Reading a source that is being written so that what was read is one state of it.

A capture has rounds. A round is a swap at an instant T and the reading of all that changed up to T
and was not read yet. It is *valid* if no change to what it read was submitted between T and the end
of its last read. The replica, which held an earlier point, and all that the rounds have read, later
ones over earlier ones, are then together a state in which a power cut at the T of the last round
could have left the source:

1. A change that completed before T is there. The drains up to T have it, so a round read it after
   it had completed; and if a later change hit the same place before T, a later read has that.
2. A change in flight at T, submitted before it and not completed, may be there in whole, in part or
   not at all: so it may on a disk that loses power at T. Nothing that is there depends on it, for
   whoever waited for its completion was still waiting.
3. No change submitted after T is there. What the last round read was not submitted to in between:
   that is its validity. What earlier rounds read, they read before T.

Torn writes fall under 2. What an earlier round read torn has either completed before T, and was
read again, or is in flight at T.

The submitted plane proves validity: a change is marked in it before the driver can see it. A swap
that others make in between drains it into the link's `racing` set; where the kernel skipped the
program that marks, or the source has more by now than it had at the swap, the proof fails.

A round that is not valid is followed by another, whose extents are what changed during it. Rounds
get smaller as long as reading is faster than writing; where they do not, the last one is taken
under a freeze of the mounted file systems, or there is no point.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from blktrack import extent
from blktrack.errors import NoPoint, Refused
from blktrack.extent import ExtentArray
from blktrack.quiesce.freeze import Freeze
from blktrack.state import DeviceState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold
from blktrack.tracker.tracking import Gap, Swap, Tracking
from blktrack.units import format_size

_MOST = 30  # rounds
_SHRINKS = 0.8  # a round of more than this part of the one before does not count as smaller
_PATIENCE = 3  # such rounds in a row
# What the last round may take, as a part of the cap of a freeze: to go for one, to try one. More
# than the first in seconds is never gone for: a further round is shorter, and so the freeze is.
_SHORT, _CALM = 0.15, 0.6
_LONGEST = 0.3

# Reads extents into the replica or its stage; calls back when the last read has ended.
Read = Callable[[ExtentArray, Callable[[], None]], None]


@dataclass
class Captured:
    """A capture that came to an end. `read` are the extents of all rounds, coalesced."""

    swap: Swap
    consistency: str  # none, crash or filesystem
    rounds: int = 0
    read: ExtentArray = field(default_factory=extent.empty)
    freeze_s: float = 0.0


@dataclass
class Source:
    """A tracked device and the link that is captured for."""

    store: Store
    device: BlockDevice
    number: str  # DeviceState.id
    sets: LinkSets

    def _state(self) -> DeviceState:
        state = self.store.device(self.number)
        assert state is not None
        return state

    def is_valid(self, swap: Swap, extents: ExtentArray) -> bool:
        """Whether a round's reading of `extents`, now ended, is of the instant of its swap. Gap."""
        with (
            hold(self.store, self.number, self.device.path),
            Tracking(self.store, self._state(), self.device) as tracking,
        ):
            if tracking.state.generation != swap.generation or self._has_grown:
                return False
            return tracking.seen_since(swap) and not extent.intersect(
                extents, self.sets.raced(tracking.submitted())
            )

    def next_round(self, before: Swap) -> tuple[Swap, ExtentArray]:
        """Swap, and what changed since the round before. Gap."""
        with (
            hold(self.store, self.number, self.device.path),
            Tracking(self.store, self._state(), self.device) as tracking,
        ):
            if tracking.state.generation != before.generation:
                raise Gap(
                    f"{self.device.path}: tracking began anew while it was read",
                    hint="run it again",
                )
            swap = tracking.drain()
            if self._has_grown:
                # The sets that are open here end too early: to take from them would lose changes.
                raise Gap(f"{self.device.path} grew while it was read", hint="run it again")
            self.sets.watch()
            return swap, self.sets.take_more()

    @property
    def _has_grown(self) -> bool:
        """Whether the source may have had more at a swap before this than the capture knows of."""
        return self.device.size > self.sets.size


def capture(
    source: Source,
    swap: Swap,
    extents: ExtentArray,
    read: Read,
    *,
    consistency: str,
    freeze: Callable[[], Freeze | None],
    cap: float,
) -> Captured:
    """Read rounds, the first of them `extents` as of `swap`, until the point asked for is reached.

    none -- one round; it is told to be `crash` if it happens to be valid.
    crash -- until one is valid. Where rounds do not get smaller the last one is under a freeze, and
        the point is `filesystem` if all file systems could be frozen.
    filesystem -- until they are small, and the last one under a freeze. Where no file system is
        mounted nothing is held still, and the point is told to be `crash`: who writes to the device
        itself, a database or a guest, may be in the middle of something.
    `freeze` is asked for only then; it says None where there is nothing to freeze. A freeze ends
    after `cap` seconds at most.
    NoPoint where that is not to be had; Gap if a change may have gone unseen meanwhile.
    """
    rounds = _Rounds(source, read, Captured(swap, "none"))
    done, pace = rounds.done, rounds.pace
    short = min(_SHORT * cap, _LONGEST)
    while True:
        valid = rounds.take(swap, extents)
        if valid and consistency != "filesystem":
            done.consistency = "crash"
            return done
        if consistency == "none":
            return done
        if pace.is_stuck or (consistency == "filesystem" and pace.is_short(short)):
            break
        swap, extents = source.next_round(swap)
    try:
        freezing = freeze() if pace.is_short(_CALM * cap) else None
        if freezing is None:
            raise _no_point(source, pace)
        with freezing as frozen:
            valid = rounds.take(*source.next_round(swap))
    except Refused as error:
        if consistency == "filesystem":
            raise
        raise _no_point(source, pace, f", and {error}") from error
    done.freeze_s = frozen.seconds
    if not valid:
        raise NoPoint(
            f"{source.device.path} was written under the freeze, {_by_whom(frozen)}",
            hint="end what writes to it, then try again",
        )
    # Validity makes it a crash point. More it is only if there were file systems that stood still.
    still = freezing.file_systems and not frozen.unfrozen
    done.consistency = "filesystem" if still else "crash"
    return done


@dataclass
class _Pace:
    """How long rounds are, in bytes and seconds."""

    sizes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    stalls: int = 0

    def note(self, size: int, seconds: float) -> None:
        if self.sizes:
            self.stalls = self.stalls + 1 if size > _SHRINKS * self.sizes[-1] else 0
        self.sizes.append(size)
        self.seconds += seconds

    @property
    def is_stuck(self) -> bool:
        """Whether further rounds are not expected to be smaller."""
        return self.stalls >= _PATIENCE or len(self.sizes) >= _MOST

    def is_short(self, limit: float) -> bool:
        """Whether a round as large as the last one takes less than so many seconds."""
        return self.sizes[-1] * self.seconds <= limit * max(sum(self.sizes), 1)


@dataclass
class _Rounds:
    """The rounds of one capture."""

    source: Source
    read: Read
    done: Captured
    pace: _Pace = field(default_factory=_Pace)

    def take(self, swap: Swap, extents: ExtentArray) -> bool:
        """Read one round and note it; whether it is valid."""
        valid = not len(extents)

        def read_ended() -> None:
            nonlocal valid
            valid = self.source.is_valid(swap, extents)

        begun = time.monotonic()
        if len(extents):
            self.read(extents, read_ended)
        self.pace.note(extent.total(extents), time.monotonic() - begun)
        done = self.done
        done.swap, done.rounds = swap, done.rounds + 1
        done.read = extent.union(done.read, extents)
        return valid


def _by_whom(frozen: Freeze) -> str:
    if not frozen.unfrozen:
        return "past its file systems"
    names = ", ".join(f"the {one}" for one in frozen.unfrozen)
    return f"past its file systems or by what cannot be frozen: {names}"


def _no_point(source: Source, pace: _Pace, more: str = "") -> NoPoint:
    sizes = ", ".join(format_size(size) for size in pace.sizes[-4:])
    return NoPoint(
        f"{source.device.path} is written faster than it can be read: no consistent point in "
        f"{len(pace.sizes)} rounds (the last of {sizes}){more}",
        hint="try again when less is written, or take what there is with --consistency none",
    )
