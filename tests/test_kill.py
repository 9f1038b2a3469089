"""Killing any command at any instruction loses nothing and needs no resync.

The last tests break the order of steps on purpose, in the command that is killed or in the one that
follows, and see a campaign of one round find it.
"""

from __future__ import annotations

import itertools
import shutil
import signal

import pytest

from blktrack.errors import BlktrackError
from blktrack.replication import Replication
from blktrack.tracker import tracker
from blktrack.units import KIB
from tests import sectors
from tests.blockdev import TOP, Lab, read_image, resize, told, write_direct
from tests.campaign import OTHERS, SIZE, SYNCS, Campaign, Situation, all_points, points, reaching
from tests.oracle import fill

kinds = pytest.mark.parametrize(
    "kind", ["loop", pytest.param("zram", marks=pytest.mark.needs("zram"))]
)
pytestmark = pytest.mark.needs("root", "loop", "bpf")


def campaign(lab: Lab, kind: str, seed: int, names: list[str], at_some_time: int) -> Campaign:
    """A round for each of the crash points, and so many at random times, in random order."""
    run = Campaign(lab, kind, seed)
    rounds = [*names, *[""] * at_some_time]
    for name in run.random.sample(rounds, len(rounds)):
        if name:
            strike_at(run, name)
        else:
            run.round(run.chosen((*SYNCS, *OTHERS))[0], run.at_some_time)
    assert set(run.hits) >= set(names)
    told(
        f"{kind}: {run.deaths} deaths in {run.rounds} rounds, at {len(run.hits)} of "
        f"{len(points())} crash points and at random times; nothing lost or resynced"
    )
    return run


def strike_at(run: Campaign, name: str) -> None:
    """Until it is hit: a turn may be one too many, or there was no point to be had."""
    before = run.hits[name]
    for situation in run.chosen(reaching(name)) * 3:
        turn = run.random.randrange(1, 5) if name.startswith("file-") else 1
        run.round(situation, run.at(name, turn))
        if run.hits[name] > before:
            return
    pytest.fail(f"no situation came to {name}: see tests.campaign.REACHED")


def reachable(kind: str) -> list[str]:
    """A zram device cannot grow."""
    return [name for name in points() if kind != "zram" or not name.startswith("grow-")]


def test_crash_points_have_names_of_their_own() -> None:
    assert len(set(all_points())) == len(all_points()) > 30


@pytest.mark.needs("zram")
def test_killed_commands_lose_nothing(shared: Lab, seed: int) -> None:
    """All crash points on a request-based device, some of them on a bio-based one."""
    first = campaign(shared, "loop", seed, reachable("loop"), 10)
    some = first.random.sample(reachable("zram"), 10)
    second = campaign(shared, "zram", seed, some, 6)
    assert first.rounds + second.rounds >= 60


@pytest.mark.soak
@kinds
def test_killed_commands_lose_nothing_for_long(shared: Lab, seed: int, kind: str) -> None:
    for number in range(3):
        with shared.fresh() as other:
            campaign(other, kind, seed + 100 * number, reachable(kind), 40)


def alone(lab: Lab, kind: str, seed: int, deaths: int) -> None:
    """Where no other device is tracked, programs, maps and pins are made and go with this one."""
    run = Campaign(lab, kind, seed)
    tracker.untrack(lab.store, run.device)
    assert not lab.store.paths.pins.exists()
    run.seconds = run.duration("track", run.device)
    run.expect_untracked()
    some = [Campaign.track, Campaign.untrack, Campaign.anew, Campaign.stop, Campaign.start]
    for situation in itertools.cycle(some):
        run.round(situation, run.at_some_time)
        if run.deaths >= deaths:
            break
    told(f"{kind} alone: {run.deaths} deaths in {run.rounds} rounds; nothing lost or resynced")


def test_killed_commands_lose_nothing_of_the_only_device(lab: Lab, seed: int) -> None:
    alone(lab, "loop", seed, 2)


@pytest.mark.soak
@kinds
def test_killed_commands_lose_nothing_of_the_only_device_for_long(
    lab: Lab, seed: int, kind: str
) -> None:
    alone(lab, kind, seed, 40)


def test_a_growth_that_died_and_was_taken_back(shared: Lab) -> None:
    """What it noted beyond the end is nothing to ship."""
    file, replica = shared.name("disk"), shared.name("replica")
    size = SIZE + 20 * KIB
    device = shared.loop(size, file=file)
    fill(device)
    tracker.track(shared.store, device, None)
    shared.sync(device, replica)
    write_direct(device, 0, sectors.make(0, 4 * KIB, 1))
    resize(device, file, size + 80 * KIB)
    died = shared.blktrack("status", device, env={"BLKTRACK_CRASH": "grow-widened"})
    assert died.code == -signal.SIGKILL
    resize(device, file, size)
    listed = shared.blktrack("extents", device, "--json").json
    assert listed["extents"] == [[0, 4 * KIB]]
    done = shared.sync(device, replica)
    assert (done.mode, done.extents, done.bytes_changed) == ("incremental", 1, 4 * KIB)
    assert not sectors.faults(read_image(device), read_image(replica))


# Steps in a wrong order: file, text, text that replaces it, situation, death, what is found.
CLEARED_FIRST = """
    found = retired.nonzero()
    retired.clear(found)
    crash.point("mutant")
"""
TAKEN_AFTERWARDS = """
            taken = np.array(self.pending.words)
            self.pending.clear()
            crash.point("mutant")
            bitmap.or_into(self.shipping.reserve(), taken)
"""
RECORDED_BEFORE_IT_IS_FILLED = """
                    link.phase, link.filled = mode, tracking.state.generation
                    self.store.save_link(self.number, link)
                    crash.point("mutant")
                    sets.fill()
"""
CURSOR_FIRST = """
                self.link.cursor = shipped.point
                self.store.save_link(self.number, self.link)
                crash.point("mutant")
                stage.seal(whole, shipped.point)
"""
NEW_SLOT_FIRST = """
    state.slot, state.maps, state.size = slot, maps, window.length
    store.save_device(state)
    crash.point("mutant")
"""
STOPPED_FIRST = """
        state.resting = True
        store.save_device(state)
        crash.point("mutant")
        swap = tracking.drain()
"""
BREAKAGES: dict[str, tuple[str, str, str, Situation, str, str]] = {
    "a map is cleared before it is merged": (
        "tracker/absorb.py",
        "\n    found = retired.nonzero()\n",
        CLEARED_FIRST,
        Campaign.incremental,
        "mutant",
        "stale",
    ),
    "a swap is not announced": (
        "tracker/tracking.py",
        '        self.store.save_epoch(self.state.id, self.epoch)\n        crash.point("drain-ann',
        '        crash.point("drain-ann',
        Campaign.incremental,
        "drain-swapped",
        "stale",
    ),
    "what is pending is cleared before it is taken": (
        "tracker/link.py",
        "\n            bitmap.or_into(self.shipping.reserve(found), self.pending.words, found)\n",
        TAKEN_AFTERWARDS,
        Campaign.taken,
        "mutant",
        "stale",
    ),
    "a copy is noted as begun before its set is filled": (
        "round.py",
        "\n                    sets.fill()\n",
        RECORDED_BEFORE_IT_IS_FILLED,
        Campaign.anew,
        "mutant",
        "stale",
    ),
    "what is to ship is forgotten before it is written": (
        "replication.py",
        "\n            with self.staging(plan, sets, observer) as (stage, durable):\n",
        "\n            sets.all_shipped()\n"
        '            crash.point("mutant")\n'
        "            with self.staging(plan, sets, observer) as (stage, durable):\n",
        Campaign.incremental,
        "mutant",
        "stale",
    ),
    "the cursor moves before the increment is sealed": (
        "replication.py",
        "\n                stage.seal(whole, shipped.point)\n",
        CURSOR_FIRST,
        Campaign.incremental,
        "mutant",
        "not at the point that it was brought to",
    ),
    "a growth is recorded before it is accounted for": (
        "tracker/growth.py",
        '\n    crash.point("grow-added")\n',
        NEW_SLOT_FIRST,
        Campaign.grow,
        "mutant",
        "is not the pending set of this device|the kernel did not count all its writes",
    ),
    "a stop is recorded before its sets are kept": (
        "tracker/rest.py",
        "\n        swap = tracking.drain()\n",
        STOPPED_FIRST,
        Campaign.stop,
        "mutant",
        "what it was stopped with is gone",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_campaign_finds_steps_in_a_wrong_order(shared: Lab, seed: int, breakage: str) -> None:
    name, old, new, situation, point, symptom = BREAKAGES[breakage]
    broken = shared.name("broken")
    shutil.copytree(TOP / "blktrack", broken / "blktrack")
    file = broken / "blktrack" / name
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{name} no longer says {old!r} once"
    file.write_text(text.replace(old, new), encoding="utf-8")
    # Nobody else writes: a change that was lost would be there again before anyone looked.
    run = Campaign(shared, "loop", seed, writing=False)
    run.commands = broken
    with pytest.raises((AssertionError, BlktrackError), match=symptom):
        run.round(situation, run.at(point))
    assert run.hits[point] == 1


def test_a_campaign_finds_a_resync_that_was_not_needed(
    shared: Lab, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it asks a replica that is ahead of it where it is, a link seems not to fit."""
    run = Campaign(shared, "loop", seed, writing=False)
    monkeypatch.setattr(Replication, "committed", lambda _: None)
    with pytest.raises(AssertionError, match="not at the point that it was brought to"):
        run.round(Campaign.incremental, run.at("commit-replica"))
