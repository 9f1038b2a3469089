"""What happens to a device, by other commands, while a sync reads it in rounds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from blktrack import sync
from blktrack.capture import Source
from blktrack.cli import progress
from blktrack.errors import Refused
from blktrack.extent import ExtentArray
from blktrack.observer import FREEZE
from blktrack.options import Options
from blktrack.ship.place import folder_of, inspect
from blktrack.ship.record import State
from blktrack.ship.stage import is_left
from blktrack.ship.target import Target
from blktrack.tracker import tracker
from blktrack.tracker.tracking import Swap
from blktrack.units import KIB, MIB
from tests.blockdev import Lab, Silent, read_image, resize, run, write_direct

pytestmark = pytest.mark.needs("root", "loop", "bpf")


def same_as(device: str, replica: str | Path) -> None:
    one, other = read_image(device), read_image(replica)
    assert len(one) == len(other)
    assert not len(np.flatnonzero(one != other)), "the replica is not the source"


def test_a_killed_capture_does_not_stand_in_the_way_of_finer_tracking(shared: Lab) -> None:
    device, replica = shared.loop(4 * MIB), shared.name("replica")
    tracker.track(shared.store, device, 64 * KIB)
    shared.sync(device, replica)
    write_direct(device, 0, os.urandom(64 * KIB))
    died = shared.blktrack("sync", device, replica, env={"BLKTRACK_CRASH": "ship-planned"})
    assert died.code == -9
    tracker.untrack(shared.store, device)
    tracker.track(shared.store, device, 4 * KIB)
    assert shared.sync(device, replica).mode == "resync"
    same_as(device, replica)


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("size", [MIB + 4 * KIB, MIB + 2 * KIB])
def test_a_device_that_grows_between_two_rounds_is_shipped_whole(
    shared: Lab, size: int, noticed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old end lies within a word of the sets, or within a granule."""
    file, replica = shared.name("disk"), shared.name("replica")
    device = shared.loop(size, file=file)
    tracker.track(shared.store, device, None)
    shared.sync(device, replica)
    write_direct(device, 0, os.urandom(64 * KIB))
    judge, grown = Source.is_valid, 4 * MIB + 2 * KIB

    def meanwhile(source: Source, swap: Swap, extents: ExtentArray) -> bool:
        """It grows, what was read is written again, and another command may find that."""
        if os.stat(file).st_size == size:
            resize(device, file, grown)
            write_direct(device, size, os.urandom(grown - size))
            write_direct(device, 0, os.urandom(4 * KIB))
            if noticed:
                shared.status(device)
        return judge(source, swap, extents)

    monkeypatch.setattr(Source, "is_valid", meanwhile)
    report = sync.sync(shared.store, device, str(replica), Options(), Silent())[0]
    assert (report.mode, report.consistency) == ("incremental", "crash")
    same_as(device, replica)
    again = sync.sync(shared.store, device, str(replica), Options(), Silent())[0]
    assert again.mode == "nothing"


def test_a_source_that_outgrows_its_replica_is_refused_before_it_is_touched(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, replica = shared.name("disk"), shared.loop(2 * MIB)
    device = shared.loop(MIB, file=file)
    tracker.track(shared.store, device, None)
    shared.sync(device, replica)
    before = read_image(replica)
    write_direct(device, 0, os.urandom(64 * KIB))
    judge = Source.is_valid

    def meanwhile(source: Source, swap: Swap, extents: ExtentArray) -> bool:
        resize(device, file, 4 * MIB)
        return judge(source, swap, extents)

    monkeypatch.setattr(Source, "is_valid", meanwhile)
    with pytest.raises(Refused, match="too small"):
        sync.sync(shared.store, device, replica, Options(), Silent())
    assert (read_image(replica) == before).all()
    place = folder_of(Target.find(replica), shared.store.paths)
    assert not is_left(place), "an increment that cannot be applied was left"


@pytest.mark.needs("ext4")
@pytest.mark.parametrize("consistency", ["crash", "none"])
def test_a_source_that_holds_our_own_state(lab: Lab, consistency: str) -> None:
    """As a root disk does: what a sync writes there is part of the next, and must not add up."""
    device, replica = lab.loop(256 * MIB), lab.loop(256 * MIB)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    options, content = Options(consistency=consistency), b""
    with lab.mounted(device) as point:
        (point / "state").mkdir()
        lab.store.paths.lib.parent.mkdir(parents=True)
        lab.store.paths.lib.symlink_to(point / "state")
        tracker.track(lab.store, device, None)
        lab.sync(device, replica)
        for _ in range(8):
            content = os.urandom(4 * MIB)
            (point / "file").write_bytes(content)
            run("sync", "--file-system", point)
            report = sync.sync(lab.store, device, replica, options, Silent())[0]
            assert (report.mode, report.reason) == ("incremental", "")
            # Twice as much where a completion went unseen and what was submitted stands in for it.
            assert report.bytes_changed < 16 * MIB
            assert consistency == "none" or report.consistency == "crash"
        record, changed = inspect(replica, lab.store.paths)
        assert record is not None
        assert (record.state, changed) == (State.READY, "")
        tracker.untrack(lab.store, device)
    if consistency == "crash":
        with lab.mounted(replica) as seen:
            assert (seen / "file").read_bytes() == content


@pytest.mark.needs("ext4")
def test_an_increment_in_place_goes_on_after_a_death(lab: Lab) -> None:
    device, replica = lab.loop(256 * MIB), lab.loop(256 * MIB)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    with lab.mounted(device) as point:
        (point / "state").mkdir()
        lab.store.paths.lib.parent.mkdir(parents=True)
        lab.store.paths.lib.symlink_to(point / "state")
        tracker.track(lab.store, device, None)
        lab.sync(device, replica)
        content = os.urandom(4 * MIB)
        (point / "file").write_bytes(content)
        run("sync", "--file-system", point)
        for place in ("ship-begun", "commit-flushed", "commit-replica"):
            died = lab.blktrack("sync", device, replica, env={"BLKTRACK_CRASH": place})
            assert died.code == -9, f"{place}: {died.err}"
        report = sync.sync(lab.store, device, replica, Options(), Silent())[0]
        assert (report.mode, report.consistency) == ("incremental", "crash")
        tracker.untrack(lab.store, device)
    with lab.mounted(replica) as seen:
        assert (seen / "file").read_bytes() == content


@pytest.mark.needs("ext4")
def test_progress_may_go_to_a_log_on_the_source(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while it is frozen: the line would wait for the thaw, and the thaw for the cap."""
    device, replica = shared.loop(64 * MIB), shared.name("replica")
    run("mkfs.ext4", "-q", device)
    tracker.track(shared.store, device, None)
    shared.sync(device, replica)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0)

    class Eager(progress.Watcher):
        """Writes whatever it is told at once, if it may."""

        def phase(self, name: str, total: int) -> None:
            super().phase(name, total)
            phases.append(name)
            self.screen.tick()

        def done(self, count: int) -> None:
            super().done(count)
            self.screen.tick()

    phases: list[str] = []
    with shared.mounted(device) as point, (point / "log").open("w") as log:
        (point / "file").write_bytes(os.urandom(MIB))
        options = Options(consistency="filesystem")
        with monkeypatch.context() as patch, Eager(quiet=False) as watcher:
            patch.setattr(sys, "stderr", log)
            report = sync.sync(shared.store, device, str(replica), options, watcher)[0]
        assert report.consistency == "filesystem"
        lines = (point / "log").read_text().splitlines()
        assert any(line.startswith("incremental: ") for line in lines)
        assert FREEZE in phases and not any(line.startswith(FREEZE) for line in lines)
        assert phases[-4:] == [FREEZE, "thawed", "writing back what was copied", "apply"]


def test_without_a_file_system_nothing_is_as_one_left_it(shared: Lab) -> None:
    """Somebody may be writing to the device itself, past what was read."""
    device, replica = shared.loop(4 * MIB), shared.name("replica")
    tracker.track(shared.store, device, None)
    shared.sync(device, replica)
    write_direct(device, 0, os.urandom(64 * KIB))
    options = Options(consistency="filesystem")
    report = sync.sync(shared.store, device, str(replica), options, Silent())[0]
    assert (report.consistency, report.freeze_s) == ("crash", 0)
    same_as(device, replica)
