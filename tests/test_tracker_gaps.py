"""What ends a generation, what does not, and how a gap is told and closed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blktrack.bpf import abi, kernel, libbpf
from blktrack.bpf.planes import Geometry, possible_cpus
from blktrack.tracker import account
from blktrack.tracker.tracking import Gap
from blktrack.units import KIB, MIB, SECTOR
from tests import sectors
from tests.blockdev import TOP, Lab, detach, pairs, read_image, run
from tests.oracle import fill
from tests.tracked import write

pytestmark = pytest.mark.needs("root", "loop", "bpf")


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
        ("unbegun", "ended that were not seen to begin"),
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


def test_a_count_that_is_behind_for_a_moment_is_no_doubt(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program comes first: a processor that is held after it has yet to count the same end."""
    watch = shared.track(shared.loop(16 * MIB))
    take, held = account.take, [True, True]

    def told(*of: Any) -> account.Account:
        now = take(*of)
        return replace(now, unended=now.unended - 4 * KIB) if held and held.pop() else now

    monkeypatch.setattr(account, "take", told)
    watch.drain()
    assert not held


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
