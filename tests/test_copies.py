"""Copies of the programs: what one was not run for another sees, and all counts once."""

from __future__ import annotations

import ctypes as ct
import errno
import itertools
import os
from dataclasses import replace
from typing import Any

import pytest

from blktrack.bpf import abi, layout, libbpf, structs
from blktrack.bpf.kernel import Kernel
from blktrack.bpf.programs import BY_KIND, Program
from blktrack.tracker import tracking
from blktrack.tracker.tracking import Gap
from blktrack.units import KIB, MIB
from tests.blockdev import Lab, pairs, read_image, wait_until, write_direct
from tests.oracle import fill, missed
from tests.test_oracle import change_everywhere
from tests.test_probes import Pair

pytestmark = pytest.mark.needs("root", "bpf", "loop", "zram")

KINDS = {"loop": abi.KIND_REQUEST, "zram": abi.KIND_BIO}
BIO_QUEUE, BIO_COMPLETE = BY_KIND[abi.KIND_BIO]
TRIES, ENOUGH = 300, 3  # a bio on the stack of a task has one of some dozens of addresses
# What the kernel's skipping a program comes to: r0 = 0; exit.
NOTHING = bytes.fromhex("b700000000000000 9500000000000000")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel whose tracepoints can be preempted, whatever this one is."""
    monkeypatch.setattr(layout, "preemptible", lambda btf: True)


@pytest.fixture
def awake(monkeypatch: pytest.MonkeyPatch, kind: str, begin: set[int], end: int) -> None:
    begins, ends = BY_KIND[KINDS[kind]]
    leave(monkeypatch, {begins: begin, ends: {end}})


def leave(monkeypatch: pytest.MonkeyPatch, awake: dict[str, set[int]]) -> None:
    """Of these programs only the copies of those numbers do anything, from 1 on."""
    loading = libbpf.load_program
    texts = {text: name for name in awake for text in (name, *layout.COPIES.get(name, ()))}
    seen = dict.fromkeys(awake, 0)

    def loaded(name: str, code: bytes, target: int, types: int, functions: bytes) -> int:
        if program := texts.get(name):
            seen[program] += 1
            if seen[program] not in awake[program]:
                return loading(name, NOTHING, target)
        return loading(name, code, target, types, functions)

    monkeypatch.setattr(libbpf, "load_program", loaded)


def device_of(lab: Lab, kind: str) -> str:
    return lab.zram(64 * MIB) if kind == "zram" else lab.loop(64 * MIB)


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


# The second only with the last, which forgets what was seen, whatever becomes of its end.
@pytest.mark.parametrize(
    ("kind", "begin", "end"),
    [(kind, begin, 1) for kind in KINDS for begin in ({1}, {2, 3}, {3})]
    + [("zram", {1}, 3), ("zram", {3}, 2)],
    ids=str,
)
@pytest.mark.usefixtures("awake")
def test_any_one_copy_is_enough(lab: Lab, seed: int, kind: str) -> None:
    assert changes(lab, device_of(lab, kind), seed) == 0


def test_without_all_copies_it_is_a_doubt(
    lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, {BIO_QUEUE: set()})
    with pytest.raises(Gap, match="not seen to begin"):
        changes(lab, lab.zram(64 * MIB), seed)


SOME: list[set[int]] = [set(), {1}, {3}, {1, 3}, {2, 3}, {1, 2, 3}]


@kinds
@pytest.mark.parametrize("some", SOME, ids=str)
def test_what_the_first_does_not_see_is_caught(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str, some: set[int]
) -> None:
    """Each event counts once, however many copies see it, whatever device of the host it is of."""
    begins, _ = BY_KIND[KINDS[kind]]
    leave(monkeypatch, {begins: some})
    device = device_of(lab, kind)
    lab.track(device)
    stats = libbpf.enable_stats()
    try:
        with Kernel(lab.store.paths.pins) as kernel:

            def tally() -> tuple[int, int]:
                """Runs of the first, which are those that it would have skipped; and caught."""
                runs = kernel.programs(KINDS[kind])[begins].runs
                return runs, kernel.caught(KINDS[kind])

            runs, caught = tally()
            for number in range(50):
                write_direct(device, number % 5 * MIB, os.urandom(4 * KIB))

            def agreed() -> bool:
                now = tally()
                assert now[0] - runs >= 50
                if not some or 1 in some:
                    return now[1] == caught
                return now[1] - caught == now[0] - runs

            wait_until(agreed, what=f"what was caught to be told: {runs, caught}, now {tally()}")
    finally:
        os.close(stats)


def test_what_was_seen_is_forgotten_with_its_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last copy, which forgets it, may not be run. What has its address next is another."""
    begins, _ = BY_KIND[abi.KIND_REQUEST]
    leave(monkeypatch, {begins: {1, 2}})
    device = lab.loop(16 * MIB)
    lab.track(device)
    for number in range(5):
        write_direct(device, number * MIB, bytes(4 * KIB))
    with Kernel(lab.store.paths.pins) as kernel:
        seen = kernel.maps["seen"]
        # Other disks of the host may have something in flight at any moment.
        wait_until(lambda: not libbpf.values(seen, 8, 4), "nothing to be remembered as seen")


@kinds
def test_without_room_to_remember_what_was_seen(
    lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Each copy does all of it then."""
    monkeypatch.setattr(abi, "SEEN", 1)
    lab.track(device_of(lab, kind))
    with Kernel(lab.store.paths.pins) as kernel:
        seen = kernel.maps["seen"]

        def taken() -> bool:
            try:
                libbpf.update(seen, bytes(8), bytes(4))
            except OSError:  # by a change that begins just now
                return False
            return True

        wait_until(taken, "the room to be taken by what never ends")
    assert changes(lab, device_of(lab, kind), seed) == 0


@kinds
def test_each_change_counts_once(lab: Lab, kind: str) -> None:
    device = device_of(lab, kind)
    watch = lab.track(device)
    with watch.open() as tracking:
        before = tracking.counters()
        for number in range(5):
            write_direct(device, number * MIB, bytes(4 * KIB))
        after = tracking.counters()
        assert tracking.kernel
        assert not len(tracking.kernel.in_flight(tracking.window.disk))
    assert after["writes"] - before["writes"] == 5
    for count in ("begun", "ended", "written"):
        assert after[count] - before[count] == 5 * 4 * KIB
    for loss in ("late", "unbegun"):
        assert after[loss] == before[loss]


def test_one_just_like_one_that_was_not_seen_to_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds itself remembered, and began in this epoch all the same."""
    leave(monkeypatch, {BIO_COMPLETE: set()})
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


def test_copies_come_and_go_with_their_program(lab: Lab) -> None:
    device, loop = lab.zram(16 * MIB), lab.loop(16 * MIB)
    lab.track(device)
    lab.track(loop)
    pins = lab.store.paths.pins
    copies = {
        name: 1 + len(layout.COPIES.get(name, ())) for both in BY_KIND.values() for name in both
    }
    assert copies == {"blk_rq_issue": 3, "blk_rq_complete": 1, BIO_QUEUE: 3, BIO_COMPLETE: 3}

    def named(*kinds: int) -> set[str]:
        names = (name for kind in kinds for name in BY_KIND[kind])
        return {f"link_{name}{c}" for name in names for c in ("", "_2", "_3")[: copies[name]]}

    assert {path.name for path in pins.glob("*/link_*")} == named(*KINDS.values())
    lab.untrack(device)
    assert {path.name for path in pins.glob("*/link_*")} == named(abi.KIND_REQUEST)


@kinds
def test_a_copy_that_is_gone_is_a_doubt(lab: Lab, kind: str) -> None:
    pair = Pair(lab, "loop-512" if kind == "loop" else kind)
    begins, _ = BY_KIND[KINDS[kind]]
    (pin,) = lab.store.paths.pins.glob(f"*/link_{begins}_3")
    pin.unlink()
    pair.is_resynced_once(f"program {begins} was detached and attached anew")


@pytest.mark.parametrize("looks", [3, 1 << 30], ids=["late", "never"])
def test_a_doubt_is_only_what_stays_missed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """A task may be kept from the copy that catches what the first was not run for."""
    pair, look, caught = Pair(lab, "zram"), itertools.count(), Kernel.caught
    pair.write(MIB)
    monkeypatch.setattr(tracking, "_CATCHING", 0.02 if looks > 3 else 60)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "caught", lambda *a: caught(*a) - (next(look) < looks))
        done = lab.sync(pair.device, pair.replica)
    assert next(look) > 3
    if looks == 3:
        assert done.mode == "incremental", done.reason
    else:
        assert "skipped 1 runs of the program that sees writes begin" in done.reason
    pair.is_identical()


@pytest.mark.parametrize(
    ("skipped", "caught", "missed"),
    [((0, 0, 0), 0, 0), ((5, 0, 2), 5, 0), ((5, 1, 2), 4, 1), ((5, 1, 2), None, 1), ((7,), 0, 7)],
)
def test_what_all_copies_missed(
    monkeypatch: pytest.MonkeyPatch, skipped: tuple[int, ...], caught: int | None, missed: int
) -> None:
    def info(fd: int, kind: type[structs.ProgramInfo]) -> structs.ProgramInfo:
        return kind(recursion_misses=skipped[fd])

    monkeypatch.setattr(libbpf, "info", info)
    count = None if caught is None else lambda: caught
    program = Program.look(range(len(skipped)), range(len(skipped)), count)
    assert program.missed == missed


@kinds
def test_a_probe_that_was_off_is_a_doubt(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Copies caught more than was ever skipped: what they did not see nobody counted."""
    pair, programs = Pair(lab, "loop-512" if kind == "loop" else kind), Kernel.programs
    begins, _ = BY_KIND[KINDS[kind]]
    monkeypatch.setattr(tracking, "_CATCHING", 0.02)

    def off(self: Kernel, of: int) -> dict[str, Program]:
        found = programs(self, of)
        return {**found, begins: replace(found[begins], missed=-3, probe=True)}

    pair.write(MIB)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "programs", off)
        done = lab.sync(pair.device, pair.replica)
    assert (done.mode, "3 changes were seen to begin while the probe" in done.reason) == (
        "resync",
        True,
    ), done.reason
    pair.is_identical()


def test_without_probes_copies_are_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel is locked down: it loads them and refuses to attach them."""
    info, asked = libbpf.info, list[str]()

    def refuse(program: int, function: str) -> int:
        asked.append(function)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def described(fd: int, kind: type[ct.Structure]) -> Any:
        """The program that sees bios begin is a probe, until it is refused as one."""
        told = info(fd, kind)
        if kind is structs.ProgramInfo and told.name == BIO_QUEUE.encode()[:15] and not asked:
            told.type = libbpf.PROG_TYPE_KPROBE
        return told

    monkeypatch.setattr(libbpf, "attach_probe", refuse)
    monkeypatch.setattr(libbpf, "info", described)
    device = lab.zram(16 * MIB)
    lab.track(device)
    with Kernel(lab.store.paths.pins) as kernel:
        program = kernel.programs(abi.KIND_BIO)[BIO_QUEUE]
    assert (len(program.links), program.probe) == (3, False)
    assert asked == ["__traceiter_block_bio_queue"]
