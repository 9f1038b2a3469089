"""The sets of a link against models of them, through deaths between any two steps."""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from blktrack import bitmap, crash, extent
from blktrack.bitfile import BitFile
from blktrack.bitmap import Words
from blktrack.extent import ExtentArray, from_pairs
from blktrack.point import Point
from blktrack.state import LinkState
from blktrack.tracker import account
from blktrack.tracker.course import Course
from blktrack.tracker.link import LinkSets
from blktrack.tracker.tracking import Swap, Tracking
from blktrack.units import SECTOR
from tests.blind import COMPLETE, blind, blinded
from tests.blockdev import Lab, told, write_direct
from tests.sectors import make
from tests.workload import next_sequence

pytestmark = pytest.mark.needs("root", "loop", "bpf")

UNIT, WHOLE = 4096, 200
SIZE = WHOLE * UNIT + 512  # the last granule is cut off
GRANULES = WHOLE + 1
ROUNDS, MOST = 120, 2000
UNSEEN = 10  # a granule that no program sees the writes of end
# Between any two of these the sets of a link and its record may be left.
STEPS = {
    "catch-up-recorded", "commit-link", "commit-replica", "fill-set", "held-added", "held-cleared",
    "held-returned", "more-added", "sealing-recorded", "stage-recorded", "take-added", "take-done",
}  # fmt: skip

Bits = NDArray[np.bool_]


class Death(BaseException):
    """The process is no more."""


class Cut(Exception):
    """The connection is no more."""


def flags(words: Words) -> Bits:
    found = np.zeros(GRANULES, dtype=bool)
    found[bitmap.bits(words)] = True
    return found


def granules(extents: ExtentArray) -> Bits:
    words = np.zeros(bitmap.words_for(GRANULES), dtype=np.uint64)
    bitmap.set_extents(words, UNIT, SIZE, extents)
    return flags(words)


def extents_of(bits: Bits) -> ExtentArray:
    words = np.zeros(bitmap.words_for(GRANULES), dtype=np.uint64)
    bitmap.set_bits(words, np.flatnonzero(bits))
    return bitmap.extents(words, UNIT, SIZE)


def submitted(tracking: Tracking) -> Words:
    """What the next drain adds, where a write has ended and no program has seen it."""
    _, complete = tracking.program_pair()
    known = account.known(tracking.epoch, tracking.state.slot)
    now = tracking.counts()
    assert known and now
    unseen = now.unended > known.unended
    if not unseen and not complete.missed_since(tracking.epoch.complete_missed):
        return np.zeros(tracking.words, dtype=np.uint64)
    run = tracking.store.run(tracking.state.id)
    with BitFile(run / "settling", tracking.words) as settling:
        return tracking.submitted() | settling.words


class Far:
    """A device, and a receiver elsewhere, as the number of the write that each granule is from."""

    def __init__(self, lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = np.random.default_rng(seed)
        self.device = lab.loop(SIZE)
        self.watch = lab.track(self.device)
        self.store, self.number = self.watch.store, self.watch.state.id
        self.source, self.replica = (np.zeros(GRANULES, dtype=int) for _ in range(2))
        self.stage, self.stage_id = np.zeros(GRANULES, dtype=int), ""
        self.point = Point(0, self.watch.state.generation, 0.0, "none")
        self.watch.link.cursor = self.point
        self.store.save_link(self.number, self.watch.link)
        self.mortal = False
        self.deaths: Counter[str] = Counter()
        monkeypatch.setattr(crash, "point", self.pass_by)

    def pass_by(self, name: str) -> None:
        # More readily where none has died yet.
        odds = 0.3 if name in STEPS and not self.deaths[name] else 0.02
        if self.mortal and self.chance(odds):
            self.deaths[name] += 1
            raise Death

    def chance(self, odds: float) -> bool:
        return bool(self.random.random() < odds)

    @property
    def link(self) -> LinkState:
        (link,) = self.store.links(self.number)
        return link

    def write(self) -> None:
        """A few granules, in runs."""
        for _ in range(self.random.integers(4)):
            first = int(self.random.integers(GRANULES))
            for granule in range(first, min(first + int(self.random.integers(1, 9)), GRANULES)):
                start = granule * UNIT
                data = make(start, min(UNIT, SIZE - start), next_sequence())
                write_direct(self.device, start, data)
                self.source[granule] += 1

    def round(self) -> bool:
        """One round, or what a death or a cut leaves of it; whether it came to its end."""
        full, in_place = self.chance(0.02), self.chance(0.1)
        if self.chance(0.1):
            self.stage_id = ""
        with contextlib.ExitStack() as stack:
            with self.watch.open() as tracking:
                swap = tracking.drain()
                link = self.link
                course = Course(self.store, self.number, link)
                sets = stack.enter_context(LinkSets(tracking, link))
                if course.catch_up(self.point, swap.generation):
                    sets.all_shipped()
                    assert not len(sets.extents()) and not len(sets.held_extents())
                course.go_on(None if in_place else self.stage_id, sets)
                if full:
                    sets.fill()
                    link.stage = ""
                    self.store.save_link(self.number, link)
                extents = sets.extents() if full else sets.take()
            return self._ship(sets, course, swap, extents, staged=not in_place and not full)

    def _ship(
        self, sets: LinkSets, course: Course, swap: Swap, extents: ExtentArray, *, staged: bool
    ) -> bool:
        place = self.stage if staged else self.replica
        if staged and not self.stage_id:
            self.stage_id, self.stage[:] = str(uuid.uuid4()), -1
        if staged:
            course.stage_in(self.stage_id, sets)
        else:
            self.stage_id = ""
        read = self._read(sets, extents, place, staged=staged)
        while self.chance(0.3):
            with self.watch.open() as tracking:
                swap = tracking.drain()
                more = sets.take_more()
            read |= self._read(sets, more, place, staged=staged)
        point = Point(swap.epoch, swap.generation, swap.time, "none")
        course.announce(point)
        if staged:
            read |= granules(sets.held_extents())
            assert (self.stage[read] >= 0).all(), "what is sealed was staged"
            self.replica[read] = self.stage[read]
        self.point, self.stage_id = point, ""
        crash.point("commit-replica")
        if self.chance(0.4):
            raise Cut
        course.link.move_to(point)
        self.store.save_link(self.number, course.link)
        crash.point("commit-link")
        sets.all_shipped()
        return True

    def _read(
        self, sets: LinkSets, extents: ExtentArray, place: NDArray[np.int_], *, staged: bool
    ) -> Bits:
        """In batches, each durable before the next; the device is written meanwhile."""
        left = granules(extents)
        while left.any():
            some = left & (self.random.random(GRANULES) < 0.4)
            place[some] = self.source[some]
            if self.chance(0.3):
                self.write()
            if staged and self.chance(0.8):
                half = from_pairs([(int(self.random.integers(WHOLE)) * UNIT, UNIT // 2)])
                sets.staged(extent.union(extents_of(some), half))
            if self.chance(0.05):
                raise Cut
            left &= ~some
        return granules(extents)

    def check(self) -> None:
        """Nothing that the receiver lacks is forgotten, or thought to be where it is not."""
        self.mortal = False
        with self.watch.open() as tracking, LinkSets(tracking, self.link) as sets:
            live = tracking.live() | submitted(tracking)
            listed = flags(live) | flags(sets.pending.words) | flags(sets.shipping.words)
            held = granules(sets.held_extents())
            assert (flags(sets.union(live)) == listed | held).all()
        # What is held in a stage that is gone is given back before anything else is done.
        is_there = self.link.stage == self.stage_id != ""
        listed |= held & (self.stage == self.source) if is_there else held
        lost = (self.source != self.replica) & ~listed
        assert not lost.any(), f"lost: {np.flatnonzero(lost)}"


@pytest.fixture
def far(lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    blinded(monkeypatch, lab.folder, COMPLETE, code=blind(UNSEEN * UNIT // SECTOR))
    yield Far(lab, seed, monkeypatch)


def test_no_change_is_lost_between_sets(far: Far) -> None:
    ended = rounds = 0
    while rounds < ROUNDS or STEPS - set(far.deaths):
        assert rounds < MOST, STEPS - set(far.deaths)
        far.write()
        far.mortal = True
        with contextlib.suppress(Death, Cut):
            ended += far.round()
        far.check()
        rounds += 1
    while True:
        with contextlib.suppress(Cut):
            if far.round():
                break
    far.check()
    told(f"sets: {ended} of {rounds} rounds ended, {far.deaths.total()} died")


def test_what_is_left_after_a_commit_that_nobody_heard_of(far: Far) -> None:
    """A point that was reached leaves nothing of it to ship, one that was only announced does."""
    far.source += 1
    whole = from_pairs([(0, SIZE)])
    for reached in (False, True):
        with far.watch.open() as tracking:
            swap = tracking.drain()
            course = Course(far.store, far.number, far.link)
            assert not course.catch_up(far.point, swap.generation)
            with LinkSets(tracking, course.link) as sets:
                sets.fill()
                course.go_on("", sets)
                course.stage_in("a stage", sets)
                sets.staged(from_pairs([(0, 10 * UNIT)]))
                assert sets.held_extents().tolist() == [[0, 10 * UNIT]]
                assert sets.extents().tolist() == [[10 * UNIT, SIZE - 10 * UNIT]]
            point = Point(swap.epoch, swap.generation, swap.time, "none")
            course.announce(point)
        at = point if reached else far.point
        with far.watch.open() as tracking:
            course = Course(far.store, far.number, far.link)
            assert course.link.sealing == point
            assert course.catch_up(at, swap.generation) == reached
            assert far.link.sealing is None
            assert far.link.cursor == at
            assert far.link.stage == ("" if reached else "a stage")
            with LinkSets(tracking, course.link) as sets:
                assert extent.union(sets.extents(), sets.held_extents()).tolist() == whole.tolist()


def test_a_stage_is_not_taken_for_another(far: Far) -> None:
    with far.watch.open() as tracking, LinkSets(tracking, far.link) as sets:
        course = Course(far.store, far.number, far.link)
        sets.fill()
        with pytest.raises(ValueError, match="no set for what a stage holds"):
            sets.staged(from_pairs([(0, UNIT)]))
        course.go_on("", sets)
        course.stage_in("one", sets)
        sets.staged(from_pairs([(0, UNIT)]))
        with pytest.raises(ValueError, match="in the stage 'one', not in 'two'"):
            course.stage_in("two", sets)
        course.go_on("one", sets)
        assert len(sets.held_extents())
        course.go_on("two", sets)
        assert not len(sets.held_extents())
        assert sets.extents().tolist() == [[0, SIZE]]
        assert far.link.stage == ""


def test_the_sets_are_sets(far: Far) -> None:
    """Random moves of bits, against the same moves of arrays of flags."""
    random = far.random
    with far.watch.open() as tracking, LinkSets(tracking, far.link) as sets:
        pending, shipping, held = (np.zeros(GRANULES, dtype=bool) for _ in range(3))
        sets.make_held()
        for _ in range(500):
            done = extents_of(random.random(GRANULES) < random.choice([0.02, 0.5]))
            some = granules(done)
            if random.random() < 0.5:
                bitmap.set_extents(sets.pending.reserve(), UNIT, SIZE, done)
                pending |= some
            match random.integers(8):
                case 0:
                    sets.take()
                    shipping, pending = shipping | pending, pending & False
                case 1:
                    assert (granules(sets.take_more()) == pending).all()
                    shipping, pending = shipping | pending, pending & False
                case 2 | 3:
                    sets.staged(done)
                    held, shipping = held | some, shipping & ~some
                case 4:
                    sets.shipped(done)
                    shipping &= ~some
                case 5:
                    sets.give_back()
                    shipping, held = shipping | held, held & False
                case 6 if random.random() < 0.3:
                    sets.fill()
                    shipping, held, pending = shipping | True, held & False, pending & False
                case 7 if random.random() < 0.3:
                    sets.all_shipped()
                    shipping, held = shipping & False, held & False
            assert (flags(sets.pending.words) == pending).all()
            assert (granules(sets.extents()) == shipping).all()
            assert (granules(sets.held_extents()) == held).all()
            live = tracking.live() | submitted(tracking)
            assert (flags(sets.union(live)) == pending | shipping | held | flags(live)).all()
