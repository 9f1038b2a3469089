"""Completions that no program saw, not even to be skipped: found by the kernel's own count."""

from __future__ import annotations

from pathlib import Path

import pytest

from blktrack import sync
from blktrack.capture import Source
from blktrack.errors import Refused, ResyncNeeded
from blktrack.extent import ExtentArray
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.tracker.tracking import Gap, Swap
from blktrack.units import KIB, MIB
from tests import sectors
from tests.blind import BLIND_TO_BIO, COMPLETE, ISSUE, REMEMBERED, blinded
from tests.blockdev import Lab, Silent, pairs, read_image, wait_until, write_direct
from tests.oracle import fill, missed

on_loop = pytest.mark.needs("root", "loop", "bpf")


def change(device: str, offset: int, number: int) -> None:
    write_direct(device, offset, sectors.make(offset, 4 * KIB, number))


def switched_off(lab: Lab, device: str) -> Path:
    """Stop the kernel's count of what is written to it, until the test ends at most."""
    iostats = Path(f"/sys/block/{Path(device).name}/queue/iostats")
    lab.stack.callback(iostats.write_text, "1", encoding="ascii")
    iostats.write_text("0", encoding="ascii")
    return iostats


@on_loop
def test_a_completion_that_no_program_saw_is_covered(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    blinded(monkeypatch, lab.folder, COMPLETE)
    device = lab.loop(16 * MIB)
    fill(device)
    watch = lab.track(device)
    for number in range(1, 4):
        before = read_image(device)
        change(device, 5 * MIB, number)
        change(device, 7 * MIB, number)
        tracked = watch.take()
        assert not len(missed(before, read_image(device), tracked))
    # Accounted for, it does not make the next epochs larger.
    change(device, 9 * MIB, 4)
    watch.take()
    change(device, 11 * MIB, 5)
    assert pairs(watch.take()) == [(11 * MIB, 4 * KIB)]


@on_loop
def test_without_the_kernels_count_a_disk_is_not_tracked(shared: Lab) -> None:
    """A write that lasts over two drains, and whose end no program saw, would be lost."""
    device = shared.loop(16 * MIB)
    iostats = switched_off(shared, device)
    with pytest.raises(Refused, match=r"does not count what is written .*iostats is 0") as caught:
        shared.track(device)
    assert str(iostats) in caught.value.hint
    assert "not tracked" in shared.blktrack("status", device).err
    iostats.write_text("1", encoding="ascii")
    shared.track(device)


@on_loop
@pytest.mark.parametrize("again", [False, True])
def test_a_count_that_is_switched_off_is_a_doubt(shared: Lab, again: bool) -> None:
    device = shared.loop(16 * MIB)
    watch = shared.track(device)
    iostats = switched_off(shared, device)
    change(device, 5 * MIB, 1)
    if again:
        iostats.write_text("1", encoding="ascii")
    with pytest.raises(Gap, match="the kernel did not count all its writes"):
        watch.take()
    if not again:
        with pytest.raises(Refused, match="iostats is 0"):
            shared.sync(device, str(shared.name("replica")))


@on_loop
def test_a_change_that_no_program_saw_at_all_is_a_doubt(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    blinded(monkeypatch, lab.folder, COMPLETE, ISSUE)
    device, replica = lab.loop(16 * MIB), str(lab.name("replica"))
    fill(device)
    lab.track(device)

    def synced(options: Options) -> SyncReport:
        # In this process: another would not take the blinded programs for its own.
        return sync.sync(lab.store, device, replica, options, Silent())[0]

    assert synced(Options()).mode == "initial"
    change(device, 5 * MIB, 1)
    with pytest.raises(ResyncNeeded, match="seen by the kernel alone"):
        synced(Options(no_resync=True))
    done = synced(Options())
    assert (done.mode, done.bytes_shipped) == ("resync", 4 * KIB)
    assert not sectors.faults(read_image(device), read_image(replica))
    assert synced(Options()).mode == "nothing"


@on_loop
def test_what_no_program_saw_while_it_was_read_is_in_no_point(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    blinded(monkeypatch, lab.folder, COMPLETE, ISSUE)
    device, replica = lab.loop(16 * MIB), str(lab.name("replica"))
    fill(device)
    lab.track(device, 64 * KIB)
    lab.sync(device, replica)
    judge = Source.is_valid

    def meanwhile(source: Source, swap: Swap, extents: ExtentArray) -> bool:
        change(device, 5 * MIB, 2)
        return judge(source, swap, extents)

    monkeypatch.setattr(Source, "is_valid", meanwhile)
    change(device, 5 * MIB + 4 * KIB, 1)
    with pytest.raises(ResyncNeeded, match="seen by the kernel alone"):
        sync.sync(lab.store, device, replica, Options(no_resync=True), Silent())


@pytest.mark.needs("root", "zram", "bpf")
def test_a_bio_whose_completion_no_program_saw_stays_in_view(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken as changed by each drain, until its address is used again."""
    blinded(monkeypatch, lab.folder, REMEMBERED, code=BLIND_TO_BIO)
    device = lab.zram(16 * MIB)
    fill(device)
    watch = lab.track(device)

    def forgotten() -> int:
        with watch.open() as tracking:
            assert tracking.kernel
            return len(tracking.kernel.in_flight(tracking.window.disk))

    for number in range(1, 4):
        before = read_image(device)
        change(device, 5 * MIB, number)
        assert forgotten()
        change(device, 7 * MIB, number)
        tracked = watch.take()
        assert not len(missed(before, read_image(device), tracked))

    def reused() -> bool:
        change(device, 9 * MIB, 4)
        return not forgotten()

    wait_until(reused, "another use of the address of the bio")
    assert (5 * MIB, 4 * KIB) in pairs(watch.take())
    change(device, 11 * MIB, 5)
    assert pairs(watch.take()) == [(11 * MIB, 4 * KIB)]
    assert not lab.status(device)["doubts"]
