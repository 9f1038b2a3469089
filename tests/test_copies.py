"""Copies of the bio programs: what one was not run for another sees, and all counts once."""

from __future__ import annotations

import pytest

from blktrack.bpf import abi, layout, libbpf
from blktrack.bpf.programs import BY_KIND, Program
from blktrack.tracker.tracking import Gap
from blktrack.units import KIB, MIB
from tests.blockdev import Lab, pairs, read_image, write_direct
from tests.oracle import fill, missed
from tests.test_oracle import change_everywhere
from tests.test_probes import Pair

pytestmark = pytest.mark.needs("root", "bpf", "zram")

QUEUE, COMPLETE = BY_KIND[abi.KIND_BIO]
COPIES = 3
TRIES, ENOUGH = 300, 3  # a bio on the stack of a task has one of some dozens of addresses
# What the kernel's skipping a program comes to: r0 = 0; exit.
NOTHING = bytes.fromhex("b700000000000000 9500000000000000")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel whose tracepoints can be preempted, whatever this one is."""
    monkeypatch.setattr(layout, "copies", lambda btf: COPIES)


def leave(monkeypatch: pytest.MonkeyPatch, awake: dict[str, int]) -> None:
    """Of these programs only the copy of that number does anything."""
    load, seen = libbpf.load_program, dict.fromkeys(awake, 0)

    def loaded(name: str, code: bytes, target: int) -> int:
        if name in awake:
            seen[name] += 1
            if seen[name] != awake[name]:
                code = NOTHING
        return load(name, code, target)

    monkeypatch.setattr(libbpf, "load_program", loaded)


def changes(lab: Lab, device: str, seed: int) -> int:
    """Sectors that differ and were not tracked."""
    watch = lab.track(device)
    fill(device)
    watch.take()
    before = read_image(device)
    change_everywhere(device, seed)
    look = watch.look()
    assert not any(look.losses.values()), look.losses
    return len(missed(before, read_image(device), look.drained))


@pytest.mark.parametrize("queue", [1, 2, 3])
@pytest.mark.parametrize("complete", [1, 3])
@pytest.mark.usefixtures("copies")
def test_any_one_copy_is_enough(
    lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch, queue: int, complete: int
) -> None:
    leave(monkeypatch, {QUEUE: queue, COMPLETE: complete})
    assert changes(lab, lab.zram(64 * MIB), seed) == 0


@pytest.mark.usefixtures("copies")
def test_without_all_copies_it_is_a_doubt(
    lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, {QUEUE: 0})
    with pytest.raises(Gap, match="not seen to begin"):
        changes(lab, lab.zram(64 * MIB), seed)


@pytest.mark.usefixtures("copies")
def test_each_change_counts_once(lab: Lab) -> None:
    device = lab.zram(64 * MIB)
    watch = lab.track(device)
    with watch.open() as tracking:
        before = tracking.counters()
        for number in range(5):
            write_direct(device, number * MIB, bytes(4 * KIB))
        after = tracking.counters()
        assert tracking.kernel
        assert not len(tracking.kernel.in_flight(tracking.window.disk))
    assert after["writes"] - before["writes"] == 5
    assert after["written"] - before["written"] == 5 * 4 * KIB
    for loss in ("late", "unbegun"):
        assert after[loss] == before[loss]


@pytest.mark.usefixtures("copies")
def test_one_just_like_one_that_was_not_seen_to_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds itself remembered, and began in this epoch all the same."""
    leave(monkeypatch, {COMPLETE: 0})
    device = lab.zram(16 * MIB)
    watch, alike, remembered = lab.track(device), 0, 0
    for _ in range(TRIES):
        write_direct(device, MIB, bytes(4 * KIB))
        assert pairs(watch.look().submitted) == [(MIB, 4 * KIB)]
        with watch.open() as tracking:
            assert tracking.kernel
            now = len(tracking.kernel.in_flight(tracking.window.disk))
        alike, remembered = alike + (now == remembered), now
        if alike == ENOUGH:
            return
    raise AssertionError(f"{alike} of {TRIES} bios had the address of one before")


@pytest.mark.usefixtures("copies")
def test_copies_come_and_go_with_their_program(lab: Lab) -> None:
    device = lab.zram(16 * MIB)
    lab.track(device)
    pins = lab.store.paths.pins
    named = {path.name for path in pins.glob("*/link_*")}
    assert named == {
        f"link_{name}{copy}" for name in BY_KIND[abi.KIND_BIO] for copy in ("", "_2", "_3")
    }
    loop = lab.loop(16 * MIB)
    lab.track(loop)
    lab.untrack(device)
    assert {path.name for path in pins.glob("*/link_*")} == {
        f"link_{name}" for name in BY_KIND[abi.KIND_REQUEST]
    }


@pytest.mark.usefixtures("copies")
def test_a_copy_that_is_gone_is_a_doubt(lab: Lab) -> None:
    pair = Pair(lab, "zram")
    (pin,) = lab.store.paths.pins.glob(f"*/link_{QUEUE}_3")
    pin.unlink()
    pair.is_resynced_once(f"program {QUEUE} was detached and attached anew")


@pytest.mark.parametrize(
    ("counts", "most"),
    [((0, 0, 0), 0), ((5, 0, 2), 0), ((5, 1, 2), 1)],
)
def test_what_all_copies_skipped(counts: tuple[int, ...], most: int) -> None:
    before = (3, 8, 1)
    now = tuple(a + b for a, b in zip(before, counts, strict=True))
    assert Program((1, 2, 3), now, 0, 0).missed_since(before) == most
