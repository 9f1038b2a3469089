"""A stage that is kept: whatever dies when, it holds what was told to be durable, and goes on."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from blktrack.extent import ExtentArray, total, union
from blktrack.ship.stage import Stage
from blktrack.units import SECTOR
from tests.blockdev import told
from tests.copies import random_extents
from tests.increments import KEPT, ON_THE_WAY, Lab, every_kind
from tests.kept import image_of
from tests.loopdev import Disks
from tests.stager import PARTS, TOP, Stager, part, point
from tests.stager import told as told_file

pytestmark = pytest.mark.needs("root", "loop")

# How often a stage comes to each: its head is written too.
TURNS = {"part-flushed": 2 * PARTS, "part-written": 2 * PARTS + 1, "part-noted": 2 * PARTS}


def taken(data: bytes, extents: ExtentArray) -> np.ndarray:
    parts = [data[start : start + length] for start, length in extents.tolist()]
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


class Deaths:
    """Increments in parts, each brought by as many processes as it takes."""

    def __init__(self, lab: Lab, commands: Path = TOP) -> None:
        """commands -- the folder whose blktrack dies."""
        self.lab = lab
        self.stager = Stager(commands)
        lab.disks.held.callback(self.stager.close)
        self.found: Counter[str] = Counter()

    def begin(self) -> None:
        """The next increment."""
        lab = self.lab
        extents = random_extents(lab.rng, lab.size, lab.unit)
        while len(extents) < 2 * PARTS:
            extents = random_extents(lab.rng, lab.size, lab.unit)
        self.new = lab.change(extents)
        lab.order.what = "parts"
        told_file(lab.order).unlink(missing_ok=True)

    def run(self, crash: str = "", seconds: float | None = None) -> bool:
        """Whether one that goes on with it died."""
        died = self.stager.run(self.lab.order, crash, seconds)
        self.found["deaths"] += died
        return died

    def look(self) -> bool:
        """Whether it is in; if not, all that was told is staged, and nothing that is wrong."""
        lab, order = self.lab, self.lab.order
        with lab.open() as replica:
            assert not replica.changed
            record = replica.record
            assert record is not None and record.point is not None
            if record.point == point(order.epoch):
                return True
            assert lab.holds(lab.old)
            stage = replica.partial()
            lines = told_file(order).read_text().split("\n") if told_file(order).exists() else [""]
            if stage is None:
                self.found["nothing"] += 1
                assert lines == [""], "what was told is gone"
                return False
            with stage:
                self._check(stage, [line for line in lines if line.startswith(stage.id)])
        return False

    def _check(self, stage: Stage, lines: list[str]) -> None:
        order, decoy = self.lab.order, Path(self.lab.order.decoy).read_bytes()
        held, image = stage.staged, image_of(stage)
        self.found["with something"] += bool(len(held))
        for line in lines:
            _, number, turn = line.split()
            extents = part(order, int(number)) if turn == "1" else part(order, int(number))[::2]
            assert total(union(held, extents)) == total(held), line
            if turn == "1":
                assert (taken(image, extents) == taken(self.new, extents)).all(), line
        # All that is there is of one round or of the other, sector by sector.
        got, *rounds = (taken(data, held).reshape(-1, SECTOR) for data in (image, decoy, self.new))
        assert np.logical_or.reduce([(got == data).all(axis=1) for data in rounds]).all()

    def end(self) -> None:
        """To its end; then the replica is at it."""
        assert not self.run()
        lab = self.lab
        assert lab.has_settled() == lab.order.epoch
        assert lab.holds(self.new)
        lab.old = self.new

    def __str__(self) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in sorted(self.found.items()))


def at_every_place(lab: Lab) -> None:
    """Two deaths of each increment: at a place, and at one on the way of who goes on."""
    deaths = Deaths(lab)
    places = [*ON_THE_WAY, "part-dropped", "part-written:1"]
    for name, turns in TURNS.items():
        places += [f"{name}:{turn}" for turn in lab.rng.choice(np.arange(1, turns + 1), 3, False)]
    for place in lab.rng.permutation(places):
        deaths.begin()
        assert deaths.run(str(place)), f"nothing came to {place}"
        if lab.rng.random() < 0.5 and deaths.look():
            deaths.found["in"] += 1
        elif not (lab.folder / "incoming.part").exists() or lab.rng.random() < 0.3:
            deaths.run("part-resumed")
        else:
            name = str(lab.rng.choice([*TURNS, "part-resumed"]))
            deaths.run(name if name == "part-resumed" else f"{name}:{lab.rng.integers(1, 4)}")
        deaths.look()
        deaths.end()
    assert set(KEPT) <= {str(place).partition(":")[0] for place in (*places, "part-resumed")}
    told(f"kept stage on {lab.kind}: at crash points {deaths}")


def at_any_time(lab: Lab, count: int) -> None:
    deaths = Deaths(lab)
    longest = 0.0
    for _ in range(4):
        deaths.begin()
        deaths.end()
        longest = max(longest, deaths.stager.seconds)
    while deaths.found["deaths"] < count:
        deaths.begin()
        while deaths.run(seconds=float(lab.rng.uniform(0, longest))):
            if lab.rng.random() < 0.7 and deaths.look():
                break
        deaths.end()
    told(f"kept stage on {lab.kind}: at random moments {deaths}")


few = pytest.mark.parametrize(
    "kind", ["tmpfs", pytest.param("xfs", marks=pytest.mark.needs("xfs"))]
)


@few
def test_death_at_every_crash_point(disks: Disks, seed: int, kind: str) -> None:
    at_every_place(Lab(disks, kind, seed))


@few
def test_death_at_random_moments(disks: Disks, seed: int, kind: str) -> None:
    at_any_time(Lab(disks, kind, seed), 20)


@pytest.mark.soak
@every_kind
def test_death_for_long(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    at_every_place(lab)
    at_any_time(lab, 150)


# A step left out or in a wrong order: file, text, text that replaces it, where it dies.
BREAKAGES = {
    "what waits is noted before it is written": (
        "blktrack/ship/stage.py",
        "rows, packed = self.end.settle(self._noted)",
        "rows, packed = self.end.index()[self._noted :], 1 << 20",
        "part-noted:2",
    ),
    "it is told before it is noted": (
        "tests/stager.py",
        "                        stage.checkpoint()\n"
        "                        print(line, file=tell, flush=True)\n",
        "                        print(line, file=tell, flush=True)\n"
        "                        stage.checkpoint()\n",
        "part-flushed:3",
    ),
    "a stage that is kept is dropped by who opens its replica": (
        "blktrack/ship/apply.py",
        "Stage.find(place.folder, None if changed else record)",
        "Stage.find(place.folder)",
        "part-noted:2",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_steps_in_a_wrong_order_are_found(disks: Disks, seed: int, breakage: str) -> None:
    name, old, new, place = BREAKAGES[breakage]
    broken = disks.name("broken")
    for folder in ("blktrack", "tests"):
        shutil.copytree(TOP / folder, broken / folder)
    text = (broken / name).read_text()
    assert text.count(old) == 1, f"{name} no longer says {old!r} once"
    (broken / name).write_text(text.replace(old, new))
    for turn in range(8):  # it takes an increment of which something waits just then
        deaths = Deaths(Lab(disks, "tmpfs", seed + turn), broken)
        deaths.begin()
        assert deaths.run(place)
        if "opens" in breakage:
            order = dataclasses.replace(deaths.lab.order, what="open")
            assert not deaths.stager.run(order)
        try:
            deaths.look()
        except AssertionError:
            return
    pytest.fail("nothing was found in 8 increments")
