"""Drains and commands that die half-way: no pending change is lost."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest

from blktrack import bitmap
from blktrack.bpf import kernel
from blktrack.bpf.planes import Planes
from blktrack.state import Store
from blktrack.tracker import status
from blktrack.units import KIB, MIB
from tests import sectors
from tests.blockdev import TOP, Lab, Watch, pairs, read_image, run, told
from tests.oracle import fill
from tests.tracked import write

pytestmark = pytest.mark.needs("root", "loop", "bpf")


class Death(Exception):
    """Stands for SIGKILL: nothing that follows is done."""


# Where a drain may be interrupted, by the call that is never returned from or never begun.
DEATHS = {
    "before the swap is announced": (Store, "save_epoch", 0, True),
    "before the swap": (kernel.Kernel, "swap", 0, True),
    "after the swap": (kernel.Kernel, "swap", 0, False),
    "before the first merge": (Planes, "merge_into", 0, True),
    "after the first merge": (Planes, "merge_into", 0, False),
    "after the second merge": (Planes, "merge_into", 1, False),
    "before the clearing": (Planes, "clear", 0, True),
    "after the clearing": (Planes, "clear", 0, False),
    "before the epoch is saved": (Store, "save_epoch", 1, True),
    "after the epoch is saved": (Store, "save_epoch", 1, False),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_drain_that_died_loses_nothing(
    shared: Lab, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    owner, name, number, before = DEATHS[death]
    device = shared.loop(16 * MIB)
    one = shared.track(device)
    other = Watch(shared.store, device, "other")
    call, calls = getattr(owner, name), iter(range(100))

    def dying(*args: Any) -> Any:
        dies = next(calls) == number
        if dies and before:
            raise Death
        result = call(*args)
        if dies:
            raise Death
        return result

    write(device, MIB)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Death):
            one.drain()
    write(device, 2 * MIB)
    listed = status.extents(shared.store, device, None)
    assert {(2 * MIB, 4 * KIB)} <= set(pairs(listed.extents))
    expected = [(MIB, 4 * KIB), (2 * MIB, 4 * KIB)]
    assert pairs(one.take()) == expected
    assert pairs(other.take()) == expected
    assert pairs(one.take()) == pairs(other.take()) == []


def test_a_half_cleared_map_marks_nothing_wrong(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of full words is noted above them; clearing that was cut short must not forget it."""
    device = shared.loop(64 * MIB)
    watch = shared.track(device)
    run("blkdiscard", "--offset", str(MIB), "--length", str(40 * MIB), device)
    clear = Planes.clear

    def half(planes: Planes, found: list[bitmap.Indices]) -> None:
        clear(planes, [words[: len(words) // 2] for words in found])
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(Planes, "clear", half)
        with pytest.raises(Death):
            watch.drain()
    assert pairs(watch.take()) == [(MIB, 40 * MIB)]
    assert pairs(watch.take()) == []


def test_killed_commands_lose_nothing(shared: Lab, seed: int) -> None:
    """SIGKILL at random instants of track, sync and status, while the device is written."""
    killed(shared, random.Random(seed), 15)


@pytest.mark.soak
def test_many_killed_commands_lose_nothing(shared: Lab, seed: int) -> None:
    killed(shared, random.Random(seed), 1000)


def killed(lab: Lab, rng: random.Random, rounds: int) -> None:
    device, replica = lab.loop(32 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    lab.sync(device, replica)
    ended = 0
    for number in range(1, rounds + 1):
        for _ in range(8):
            offset = rng.randrange(32 * MIB // (4 * KIB)) * 4 * KIB
            write(device, offset, 4 * KIB, number)
        words = rng.choice([["sync", device, str(replica)]] * 3 + [["status"], ["track", device]])
        process = subprocess.Popen(
            [sys.executable, "-m", "blktrack", *words],
            cwd=TOP,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = process.communicate(timeout=rng.uniform(0.02, 0.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        else:
            ended += 1
            assert process.returncode == 0, errors
    last = lab.sync(device, replica)
    assert last.mode in ("incremental", "nothing"), last.reason
    found = sectors.faults(read_image(device), read_image(replica))
    assert not found, sectors.describe(found)
    told(f"{rounds - ended} of {rounds} commands killed in the middle, nothing lost or resynced")
