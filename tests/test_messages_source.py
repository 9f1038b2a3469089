"""What is said of a source that is in use, or is not to be trusted any more."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from blktrack import fingerprint, linux
from blktrack.errors import BlktrackError, NoPoint
from blktrack.options import Options
from blktrack.quiesce.watchdog import Watchdog
from blktrack.sync import sync
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation, service
from blktrack.tracker.tracker import find_any
from blktrack.tracker.tracking import Gap, Tracking
from blktrack.units import KIB, MIB
from blktrack.use import InUse, claimed
from tests.background import Running, assert_clear
from tests.blockdev import Lab, Silent, run
from tests.test_events import change, filled, identical

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 4 * MIB


def assert_in_use(lab: Lab, device: str, why: str) -> None:
    done = lab.blktrack("stop", device)
    assert_clear(done, 6, f"{device}: in use, {why}", "end what uses it")
    assert lab.status(device)["state"] == "tracking"


def test_a_device_that_is_claimed(shared: Lab) -> None:
    device = shared.loop(SIZE)
    shared.track(device)
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        assert_in_use(shared, device, "it is mounted or claimed")
    finally:
        os.close(fd)


def test_a_device_below_another(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume, say; not every kernel that this runs on can make one."""
    device = BlockDevice.find(shared.loop(SIZE))
    monkeypatch.setattr(BlockDevice, "holders", ["dm-0", "dm-1"])
    with pytest.raises(InUse, match="it is part of dm-0, dm-1"), claimed(device):
        pytest.fail("it was not in use")


def test_a_device_that_cannot_be_opened(shared: Lab) -> None:
    device = BlockDevice.find(shared.loop(SIZE))
    gone = replace(device, path="/nowhere/disk")
    with pytest.raises(InUse, match=r"it cannot be opened \(No such file"), claimed(gone):
        pytest.fail("it was")


def test_a_kernel_that_counts_nothing(shared: Lab) -> None:
    device = shared.loop(SIZE)
    counts = Path(f"/sys/block/{Path(device).name}/queue/iostats")
    before = counts.read_text(encoding="ascii")
    shared.track(device)
    counts.write_text("0", encoding="ascii")
    try:
        assert_in_use(shared, device, "the kernel keeps no count of its writes (queue/iostats")
    finally:
        counts.write_text(before, encoding="ascii")


def test_a_write_while_it_is_stopped(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    device = filled(shared, SIZE)
    shared.track(device)
    take = fingerprint.take

    def meanwhile(fd: int, places: list[list[int]]) -> str:
        found = take(fd, places)
        change(device, MIB)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "take", meanwhile)
        (action,) = service.stop(shared.store, device)
    assert (action.action, action.reason) == ("in use", "it was written while it was being stopped")
    assert shared.status(device)["state"] == "tracking"


def test_what_is_stopped_is_not_open(shared: Lab) -> None:
    device = shared.loop(SIZE)
    shared.track(device)
    assert shared.blktrack("stop", device).code == 0
    state, found = find_any(shared.store, device)
    assert found is not None
    with pytest.raises(Gap, match="is stopped") as caught:
        Tracking(shared.store, state, found)
    assert "blktrack start" in caught.value.hint


def test_io_that_never_pauses(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    device = BlockDevice.find(shared.loop(SIZE))
    monkeypatch.setattr(BlockDevice, "in_flight", 1)
    monkeypatch.setattr(generation, "_DRAIN_SECONDS", 0.01)
    with pytest.raises(BlktrackError, match="had I/O in flight for") as caught:
        generation.wait_for_bios(device)
    assert "less busy" in caught.value.hint


def test_a_device_that_stays_suspended(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    device = BlockDevice.find(shared.loop(SIZE))
    monkeypatch.setattr(BlockDevice, "suspended", True)
    monkeypatch.setattr(generation, "_DRAIN_SECONDS", 0.01)
    with pytest.raises(BlktrackError, match="was suspended for") as caught:
        generation.wait_for_bios(device)
    assert "dmsetup resume" in caught.value.hint


def test_tracking_that_began_anew_during_a_sync(shared: Lab) -> None:
    device, replica = filled(shared, SIZE), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, "--limit", "1M")
    running.until_open(device, replica)
    shared.untrack(device)
    shared.track(device)
    change(device, MIB)
    done = running.end()
    assert "Traceback" not in done.err
    assert done.code in (0, 3), done
    shared.sync(device, replica)
    assert identical(device, replica)


@pytest.mark.needs("ext4")
@pytest.mark.parametrize("step", ["freeze", "flush"])
def test_a_file_system_that_fails(shared: Lab, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """As one whose disk has errors does."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    device, replica = shared.loop(64 * MIB), shared.name("replica")
    run("mkfs.ext4", "-q", device)
    shared.track(device)
    shared.sync(device, replica)
    says = {"freeze": "could not be frozen", "flush": "could not be written back"}[step]
    with shared.mounted(device) as point:
        (point / "file").write_bytes(bytes(64 * KIB))
        with monkeypatch.context() as patch:
            if step == "freeze":
                patch.setattr(Watchdog, "freeze", fail)
            else:
                patch.setattr(linux, "sync_filesystem", fail)
            options = Options(consistency="filesystem")
            with pytest.raises(NoPoint, match=f"{says}: Input/output error") as caught:
                sync(shared.store, device, str(replica), options, Silent())
        assert "kernel's log" in caught.value.hint
        (point / "file").write_bytes(bytes(KIB))
    assert shared.sync(device, replica).mode == "incremental"
