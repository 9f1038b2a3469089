"""Generations, epochs and pending sets: what ends one, what outlives what, what is told of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blktrack import bitmap
from blktrack.bpf import abi, kernel, libbpf
from blktrack.bpf.planes import Geometry, Planes, possible_cpus
from blktrack.errors import BlktrackError
from blktrack.state import Store
from blktrack.tracker import account, status
from blktrack.tracker.tracking import Gap
from blktrack.units import GIB, KIB, MIB, SECTOR
from tests import sectors
from tests.blockdev import (
    TOP,
    Lab,
    Watch,
    detach,
    pairs,
    read_image,
    run,
    told,
    wait_until,
    write_direct,
)
from tests.test_oracle import fill
from tests.test_retired import load

pytestmark = pytest.mark.needs("root", "loop", "bpf")

# What design promises of each; there may be more.
DEVICE_KEYS = {
    "device",
    "size",
    "granularity",
    "state",
    "reason",
    "generation",
    "epoch",
    "dirty_bytes",
    "written_bytes",
    "writes",
    "losses",
    "links",
}
LINK_KEYS = {
    "target",
    "name",
    "epoch",
    "point",
    "consistency",
    "lag_s",
    "pending_bytes",
    "state",
}
EXTENTS_KEYS = {"device", "granularity", "generation", "epoch", "bytes", "extents"}


def write(path: str, offset: int, length: int = 4 * KIB, number: int = 1) -> None:
    write_direct(path, offset, sectors.make(offset, length, number))


def test_a_second_track_changes_nothing(shared: Lab) -> None:
    device = shared.loop(16 * MIB)
    first = shared.blktrack("track", device, "--json").json
    assert first["began"]
    write(device, MIB)
    before = shared.status(device)
    second = shared.blktrack("track", device, "--json").json
    assert second == first | {"began": False}
    assert shared.blktrack("track", device, "--granularity", "4K").code == 0
    assert shared.status(device) == before
    assert shared.blktrack("extents", device, "--json").json["extents"] == [[MIB, 4 * KIB]]


def test_another_granularity_is_refused(shared: Lab) -> None:
    device = shared.loop(16 * MIB)
    watch = shared.track(device)
    done = shared.blktrack("track", device, "--granularity", "64K")
    assert done.code == 1
    assert "4 KiB" in done.err
    assert "untrack it first" in done.err
    write(device, MIB)
    assert pairs(watch.take()) == [(MIB, 4 * KIB)]


def test_untracking_ends_the_generation(lab: Lab) -> None:
    device, replica = lab.loop(16 * MIB), lab.name("replica")
    first = lab.blktrack("track", device, "--json").json["generation"]
    lab.sync(device, replica)
    assert lab.blktrack("untrack", device).code == 0
    assert not lab.store.paths.pins.exists(), "nothing stays in the kernel"
    for words in (["extents", device], ["sync", device, str(replica)]):
        assert (lab.blktrack(*words).code, words) == (3, words)
    write(device, MIB)  # unseen
    second = lab.blktrack("track", device, "--json").json
    assert second["began"]
    assert second["generation"] != first
    (link,) = lab.status(device)["links"]
    assert (link["state"], link["reason"]) == ("resync", "it was untracked")
    assert lab.blktrack("sync", device, replica, "--no-resync").code == 3
    assert lab.sync(device, replica).mode == "resync"
    assert not sectors.faults(read_image(device), read_image(replica))


def test_json_has_the_promised_keys(shared: Lab) -> None:
    device, replica = shared.loop(16 * MIB), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    write(device, MIB, 8 * KIB)
    write(device, 3 * MIB)
    (found,) = shared.blktrack("status", device, "--json").json["devices"]
    assert set(found) >= DEVICE_KEYS
    assert (found["device"], found["size"], found["granularity"]) == (device, 16 * MIB, 4 * KIB)
    assert (found["state"], found["reason"], found["losses"]) == ("tracking", "", 0)
    assert (found["dirty_bytes"], found["written_bytes"], found["writes"]) == (12288, 12288, 2)
    (link,) = found["links"]
    assert set(link) >= LINK_KEYS
    assert (link["target"], link["name"]) == (str(replica), replica.name)
    assert (link["state"], link["pending_bytes"]) == ("ready", 12 * KIB)
    assert link["consistency"] == "crash"
    assert 0 < link["lag_s"] < 600
    for words in ([], ["--target", str(replica)], ["--target", replica.name]):
        listed = shared.blktrack("extents", device, "--json", *words).json
        assert set(listed) >= EXTENTS_KEYS
        assert listed["generation"] == found["generation"]
        assert listed["epoch"] == found["epoch"]
        assert listed["extents"] == [[MIB, 8 * KIB], [3 * MIB, 4 * KIB]]
        assert listed["bytes"] == 12 * KIB


def test_status_without_devices(lab: Lab) -> None:
    assert lab.blktrack("status", "--json").json == {"devices": [], "replicas": []}


def test_links_have_their_own_pending_sets(shared: Lab) -> None:
    device = shared.loop(16 * MIB)
    one = shared.track(device)
    other = Watch(shared.store, device, "other")
    write(device, MIB)
    assert pairs(one.take()) == [(MIB, 4 * KIB)]
    write(device, 2 * MIB)
    assert pairs(one.take()) == [(2 * MIB, 4 * KIB)]
    assert pairs(other.take()) == [(MIB, 4 * KIB), (2 * MIB, 4 * KIB)]
    assert pairs(one.take()) == pairs(other.take()) == []


def test_instances_do_not_meet(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees every change, and ending one leaves the other alone."""
    device = lab.loop(16 * MIB)
    watch = lab.track(device)
    with monkeypatch.context() as patch:
        patch.setenv("BLKTRACK_ROOT", str(lab.folder / "second"))
        second = Lab(lab.folder / "second", lab.stack)
        lab.stack.callback(kernel.remove, second.store.paths.pins)
        other = second.track(device)
        write(device, MIB)
        assert pairs(other.take()) == [(MIB, 4 * KIB)]
        second.untrack(device)
    write(device, 3 * MIB)
    assert pairs(watch.take()) == [(MIB, 4 * KIB), (3 * MIB, 4 * KIB)]


def test_sixty_four_devices_and_no_more(lab: Lab) -> None:
    disk = lab.loop(65 * MIB)
    parts = [lab.partition(disk, n + 1, n * MIB, MIB) for n in range(abi.SLOTS + 1)]
    watches = [lab.track(part) for part in parts[:-1]]
    with pytest.raises(BlktrackError, match="64 devices are tracked already") as refusal:
        lab.track(parts[-1])
    assert "untrack" in refusal.value.hint
    write(disk, MIB - 8 * KIB, 16 * KIB)
    write(disk, 63 * MIB, 2 * MIB)
    found = [pairs(watch.take()) for watch in watches]
    assert found[0] == [(MIB - 8 * KIB, 8 * KIB)]
    assert found[1] == [(0, 8 * KIB)]
    assert not any(found[2:63])
    assert found[63] == [(0, MIB)]
    lab.untrack(parts[5])
    lab.track(parts[-1])


class Target:
    """A tracked partition on a loop device, to be broken."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lab, self.monkeypatch = lab, monkeypatch
        self.file = lab.name("disk")
        self.disk = lab.own_loop(32 * MIB, self.file)
        self.device = lab.partition(self.disk, 1, 4 * MIB, 16 * MIB)
        self.watch = lab.track(self.device)

    def pin(self, name: str) -> Path:
        (found,) = self.lab.store.paths.pins.glob(f"*/{name}")
        return found

    def lose_program(self) -> None:
        self.pin("link_blk_rq_complete").unlink()

    def lose_maps(self) -> None:
        self.pin("stats").unlink()

    def lose_dirty_map(self) -> None:
        self.pin("slot_0_b").unlink()

    def lose_all_pins(self) -> None:
        kernel.remove(self.lab.store.paths.pins)

    def replace_dirty_map(self) -> None:
        planes = libbpf.open_pin(self.pin("planes"))
        fresh = kernel.create_inner(Geometry(4096))
        libbpf.update(planes, bytes(4), fresh.to_bytes(4, "little"))
        os.close(fresh)
        os.close(planes)

    def attach_anew(self) -> None:
        """As another device's track does when it finds a program missing."""
        self.lose_program()
        self.lab.track(self.lab.loop(16 * MIB))

    def give_slot_away(self) -> None:
        other = self.lab.loop(16 * MIB)
        with kernel.Kernel(self.lab.store.paths.pins) as programs:
            programs.remove(0)
        self.lab.track(other)

    def lose_state(self) -> None:
        shutil.rmtree(self.lab.store.run(self.watch.state.id))

    def reboot(self) -> None:
        self.monkeypatch.setenv("BLKTRACK_BOOT_ID", "another")

    def another_kernel(self) -> None:
        state = self.watch.state
        state.release = "5.14.0-old"
        self.lab.store.save_device(state)

    def re_create(self) -> None:
        detach(self.disk, self.file)
        run("losetup", "--partscan", self.disk, self.file)
        self.lab.partition(self.disk, 1, 4 * MIB, 16 * MIB)

    def shrink(self) -> None:
        run("resizepart", self.disk, "1", str(12 * MIB // SECTOR))

    def move(self) -> None:
        run("delpart", self.disk, "1")
        self.lab.partition(self.disk, 1, 5 * MIB, 16 * MIB)


BREAKS: list[tuple[Callable[[Target], None], str]] = [
    (Target.lose_program, "program blk_rq_complete is no longer pinned"),
    (Target.lose_maps, "the tracking maps are gone"),
    (Target.lose_dirty_map, "the dirty maps of slot 0 are no longer pinned"),
    (Target.lose_all_pins, "the tracking maps are gone"),
    (Target.replace_dirty_map, "slot 0 has another dirty map than the pinned ones"),
    (Target.attach_anew, "was detached and attached anew"),
    (Target.give_slot_away, "detached and attached anew"),
    (Target.lose_state, "its state in"),
    (Target.reboot, "the host was rebooted"),
    (Target.another_kernel, "the kernel changed into Linux"),
    (Target.re_create, "the device was re-created"),
    (Target.shrink, "the device shrank from 16 MiB to 12 MiB"),
    (Target.move, f"the partition was moved from byte {4 * MIB} to {5 * MIB}"),
]


@pytest.mark.parametrize(("break_it", "reason"), BREAKS, ids=[work.__name__ for work, _ in BREAKS])
def test_a_gap_is_named_and_closed_by_one_resync(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[Target], None],
    reason: str,
) -> None:
    target = Target(lab, monkeypatch)
    device, replica = target.device, lab.name("replica")
    lab.sync(device, replica)
    before = lab.status(device)
    break_it(target)
    write(device, MIB)
    for _ in range(2):
        found = lab.status(device)
        assert found["state"] == "gap"
        assert reason in found["reason"]
        assert [reason in doubt["reason"] for doubt in found["doubts"]] == [True]
        (link,) = found["links"]
        assert (link["state"], link["pending_bytes"]) == ("resync", None)
        assert reason in link["reason"]
    listed = lab.blktrack("extents", device)
    assert listed.code == 3
    assert reason in listed.err
    assert "-> " in listed.err, "with what to do"
    refused = lab.blktrack("sync", device, replica, "--no-resync")
    assert refused.code == 3
    assert reason in refused.err
    done = lab.sync(device, replica)
    assert done.mode == "resync"
    assert reason in done.reason
    after = lab.status(device)
    assert (after["state"], after["reason"]) == ("tracking", "")
    assert after["generation"] not in ("", before["generation"])
    assert len(after["doubts"]) == 1
    write(device, 2 * MIB)
    assert lab.sync(device, replica).mode == "incremental"
    assert not sectors.faults(read_image(device), read_image(replica))


def test_bpffs_unmounted_under_it(lab: Lab) -> None:
    """In a mount namespace of its own, where the pins are out of sight; a new bpffs is mounted."""
    device, replica = lab.loop(16 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    lab.sync(device, replica)
    write(device, MIB)
    blktrack = f"{sys.executable} -m blktrack"
    script = f"""
        set -e
        cd {TOP}
        umount --lazy /sys/fs/bpf
        {blktrack} status {device}
        {blktrack} sync {device} {replica} --json
        {blktrack} sync {device} {replica} --json
        umount --lazy /sys/fs/bpf
    """
    out = run("unshare", "--mount", "sh", "-c", script).splitlines()
    assert "the tracking maps are gone" in out[1]
    assert [json.loads(line)["mode"] for line in out[-2:]] == ["resync", "nothing"]
    assert not sectors.faults(read_image(device), read_image(replica))
    # Out here the old maps are still pinned, but they are not what it is tracked by any more.
    found = lab.status(device)
    assert found["state"] == "gap"
    assert lab.sync(device, replica).mode == "resync"
    assert lab.sync(device, replica).mode == "nothing"


def test_track_closes_a_gap(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(lab, monkeypatch)
    before = lab.status(target.device)["generation"]
    target.lose_program()
    again = lab.blktrack("track", target.device, "--json").json
    assert again["began"]
    assert again["generation"] != before
    assert lab.status(target.device)["state"] == "tracking"


def test_an_absent_device(shared: Lab) -> None:
    file = shared.name("disk")
    device = shared.own_loop(16 * MIB, file)
    shared.track(device)
    detach(device, file)
    found = shared.status(device)
    assert (found["state"], found["reason"]) == ("absent", "no device with its identity is there")
    # Back under another name it is known again, by what is in it.
    elsewhere = shared.loop(16 * MIB, file=file)
    found = shared.status(elsewhere)
    assert (found["device"], found["state"]) == (elsewhere, "gap")
    assert "re-created" in found["reason"]
    assert shared.blktrack("untrack", device).code == 0
    assert shared.blktrack("extents", elsewhere).code == 3


@pytest.mark.parametrize(
    ("counter", "reason"),
    [
        ("opaque", "pass-through or unknown commands"),
        ("beyond", "beyond the end"),
        ("full", "could not be remembered"),
        ("overflow", "more ranges than can be followed"),
    ],
)
def test_a_counted_loss_ends_the_generation(shared: Lab, counter: str, reason: str) -> None:
    device = shared.loop(16 * MIB)
    watch = shared.track(device)
    counts = np.zeros(possible_cpus(), dtype=abi.STATS)
    counts[counter] = 1
    stats = libbpf.open_pin(next(shared.store.paths.pins.glob("*/stats")))
    libbpf.update(stats, watch.state.slot.to_bytes(4, "little"), counts.tobytes())
    os.close(stats)
    found = shared.status(device)
    assert found["state"] == "gap"
    assert reason in found["reason"]
    with pytest.raises(Gap, match=reason):
        watch.take()
    assert len(shared.status(device)["doubts"]) == 1


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


@pytest.mark.needs("fio")
def test_status_reads_maps_in_use(shared: Lab) -> None:
    """Many words, set while they are scanned. Discards take no memory."""
    device = shared.loop(64 * GIB)
    shared.track(device, 4 * KIB)
    with load(device, "--rw=randtrim", "--norandommap", "--time_based", "--runtime=1h"):
        wait_until(lambda: shared.status(device)["writes"] > 1000, "the load")
        for _ in range(60):
            shared.status(device)


def test_a_device_in_the_place_of_another(shared: Lab) -> None:
    """It has the other's number, slot and size: ending the one must not end the other."""
    first, second = shared.name("disk"), shared.name("disk")
    node = shared.own_loop(16 * MIB, first)
    one = shared.track(node)
    detach(node, first)
    shutil.copy(first, second)
    run("losetup", "--partscan", node, second)
    shared.stack.callback(detach, node, second)
    other = shared.track(node)
    assert other.state.id != one.link.id
    write(node, MIB)
    elsewhere = shared.loop(16 * MIB, file=first)
    assert shared.status(elsewhere)["state"] == "gap"
    shared.untrack(elsewhere)
    assert pairs(other.take()) == [(MIB, 4 * KIB)]


def test_a_device_that_grew_goes_on_in_its_generation(shared: Lab) -> None:
    """What is new of it counts as changed; what was pending before stays so."""
    file = shared.name("disk")
    device = shared.loop(16 * MIB, file=file)
    small, large = shared.loop(16 * MIB), shared.loop(32 * MIB)
    fill(device)
    shared.track(device)
    for replica in (small, large):
        shared.sync(device, replica)
    before = shared.status(device)
    write(device, 3 * MIB)
    os.truncate(file, 32 * MIB)
    run("losetup", "--set-capacity", device)
    write(device, 31 * MIB)
    found = shared.status(device)
    assert (found["state"], found["size"]) == ("tracking", 32 * MIB)
    assert found["generation"] == before["generation"]
    assert {link["pending_bytes"] for link in found["links"]} == {16 * MIB + 4 * KIB}
    done = shared.sync(device, large)
    assert (done.mode, done.bytes_changed) == ("incremental", 16 * MIB + 4 * KIB)
    assert not sectors.faults(read_image(device), read_image(large))
    write(device, 30 * MIB)
    done = shared.sync(device, large)
    assert (done.mode, done.bytes_changed) == ("incremental", 4 * KIB)
    assert not sectors.faults(read_image(device), read_image(large))
    # The other one is too small by now, and says so; nothing that it lacks is forgotten.
    refused = shared.blktrack("sync", device, small)
    assert refused.code == 1
    assert "too small" in refused.err or "smaller" in refused.err


def test_changes_in_flight_do_not_look_unseen_later(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While some are, the kernel's count of ended changes is behind the programs' of begun ones."""
    watch = shared.track(shared.loop(16 * MIB))
    with watch.open() as tracking:
        known = account.known(tracking.epoch, watch.state.slot)
    assert known is not None
    base, ended = known.unbegun, known.unended

    def drain(unbegun: int, unended: int) -> None:
        with monkeypatch.context() as patch:
            told = account.Account(unbegun, unended, exact=True)
            patch.setattr(account, "take", lambda *_: told)
            watch.drain()

    drain(base - 64 * KIB, ended)
    drain(base, ended + 4 * KIB)  # one completion unseen: the submitted planes stand in
    with pytest.raises(Gap, match="4 KiB of changes were seen by the kernel alone"):
        drain(base + 4 * KIB, ended + 8 * KIB)
