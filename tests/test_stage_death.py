"""Staged increments: a replica is at the old point or at the new one, whatever dies when."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import pytest

from blktrack.ship.apply import finish
from blktrack.ship.record import State
from blktrack.units import MIB
from tests.blockdev import told
from tests.increments import FILES, KINDS, NEVER, ON_THE_WAY, RESIZED, SIZE, Lab, every_kind
from tests.loopdev import Disks
from tests.stager import TOP, Stager, point

pytestmark = pytest.mark.needs("root", "loop")


class Deaths:
    """Increments whose process dies, or two of them, and what is there then."""

    def __init__(self, lab: Lab, commands: Path = TOP) -> None:
        """commands -- the folder whose blktrack dies."""
        self.lab = lab
        self.stager = Stager(commands)
        lab.disks.held.callback(self.stager.close)
        self.count = 0
        self.found: Counter[str] = Counter()

    def round(self, crash: str = "", seconds: float | None = None) -> bool:
        """Whether it died. The next one begins where this one led to."""
        lab = self.lab
        new = lab.change()
        epoch = lab.order.epoch
        died = self.stager.run(lab.order, crash, seconds)
        self.count += died
        sealed = (lab.folder / "incoming.json").exists()
        record = lab.record()
        assert record.point is not None
        committed = sealed or record.point.epoch == epoch
        if record.state is State.READY:
            self._is_at(record.point.epoch, new)
            waits = sealed and record.point.epoch < epoch
            assert record.next == (point(epoch) if waits else None)
            found = "new" if record.point.epoch == epoch else "sealed" if sealed else "old"
        else:
            assert (record.state, record.next) == (State.APPLYING, point(epoch))
            found = "applying"
        self.found[found] += died
        if lab.rng.random() < 0.3:  # what finishes it dies as well
            what, place = lab.rng.choice(["finish", "open"]), lab.rng.choice([*ON_THE_WAY, *FILES])
            self.stager.run(dataclasses.replace(lab.order, what=str(what)), str(place))
        if lab.rng.random() < 0.5 and committed:
            after = finish(str(lab.target), lab.order.paths)
            assert after is not None and after.point == point(epoch)
        at = lab.has_settled()
        assert (at == epoch) == committed
        self._is_at(at, new)
        lab.old = new if committed else lab.old
        lab.order.epoch = at
        return died

    def _is_at(self, epoch: int, new: bytes) -> None:
        assert self.lab.holds(new if epoch == self.lab.order.epoch else self.lab.old)

    def __str__(self) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in sorted(self.found.items()))


def at_every_place(lab: Lab) -> None:
    deaths = Deaths(lab)
    for place in lab.rng.permutation([*ON_THE_WAY, *FILES]):
        assert deaths.round(str(place)), f"nothing came to {place}"
    for place in NEVER:
        assert not deaths.round(place), f"an increment came to {place}: it is on the way"
    told(f"stage on {lab.kind}: {deaths.count} deaths at crash points, {deaths}")


def at_any_time(lab: Lab, count: int) -> None:
    deaths = Deaths(lab)
    longest = 0.0
    for _ in range(4):  # of some changes much more is to be done than of others
        assert not deaths.round()
        longest = max(longest, deaths.stager.seconds)
    while deaths.count < count:
        deaths.round(seconds=float(lab.rng.uniform(0, longest)))
    told(f"stage on {lab.kind}: {deaths.count} deaths at random moments, {deaths}")


few = pytest.mark.parametrize(
    "kind", ["tmpfs", "512", pytest.param("xfs", marks=pytest.mark.needs("xfs"))]
)


@few
def test_death_at_every_crash_point(disks: Disks, seed: int, kind: str) -> None:
    at_every_place(Lab(disks, kind, seed))


@few
def test_death_at_random_moments(disks: Disks, seed: int, kind: str) -> None:
    at_any_time(Lab(disks, kind, seed), 34)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_death_while_a_replica_gets_another_size(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    deaths = Deaths(lab)
    for size in (SIZE + 5 * MIB, SIZE - 3 * MIB):
        lab.resize(size)
        assert deaths.round(RESIZED)
        assert lab.target.stat().st_size == size


@pytest.mark.soak
@every_kind
def test_death_for_long(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    at_every_place(lab)
    at_any_time(lab, 100)


APPLY = "ship/apply.py"
LEAVE = "    place.leave(stage.link, source, State.APPLYING, stage.base, stage.point)\n"
BRING = "    _bring(place, stage, progress, stop or threading.Event())\n"
ARRIVE = "    place.arrive(stage.link, source, stage.point)\n"
# Steps in a wrong order: file, text, text that replaces it, where it dies.
BREAKAGES = {
    "it is applied before that is on record": (
        APPLY,
        f'{LEAVE}{BRING}    crash.point("apply-copied")\n',
        f'{BRING}    crash.point("apply-copied")\n{LEAVE}',
        "apply-copied",
    ),
    "the point is on record before the bytes are": (
        APPLY,
        f'{BRING}    crash.point("apply-copied")\n{ARRIVE}',
        f'{ARRIVE}    crash.point("apply-copied")\n{BRING}',
        "apply-copied",
    ),
    "the stage is dropped before the point is on record": (
        APPLY,
        ARRIVE,
        f"    stage.drop()\n{ARRIVE}",
        "commit-flushed",
    ),
    "it is sealed before its second round": (
        "../tests/stager.py",
        "        copy(source, stage.end, every)\n        stage.seal(every, point(order.epoch))\n",
        "        stage.seal(every[::2], point(order.epoch))\n"
        "        copy(source, stage.end, every)\n",
        "stage-sealed",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_steps_in_a_wrong_order_are_found(disks: Disks, seed: int, breakage: str) -> None:
    name, old, new, place = BREAKAGES[breakage]
    broken = disks.name("broken")
    for folder in ("blktrack", "tests"):
        shutil.copytree(TOP / folder, broken / folder)
    file = broken / "blktrack" / name
    text = file.read_text()
    assert text.count(old) == 1, f"{name} no longer says {old!r} once"
    file.write_text(text.replace(old, new))
    deaths = Deaths(Lab(disks, "tmpfs", seed), broken)
    with pytest.raises(AssertionError):
        deaths.round(place)
    assert deaths.count == 1
