"""Writes that are in flight when tracking starts, some of which the kernel does not count."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from blktrack import sync
from blktrack.errors import BlktrackError, NotTracked
from blktrack.options import Options
from blktrack.tracker import generation, tracker
from tests.blockdev import PATIENCE, Lab, read_image, wait_until
from tests.oracle import fill
from tests.vm.guest.replicated import SIZE, Meanwhile, crash, delayed, identical, running
from tests.vm.guest.volume import Volume
from tests.vm.guest.writers import Writers

pytestmark = [
    pytest.mark.needs("root", "bpf", "dmsetup"),
    pytest.mark.machine("inflight"),
    pytest.mark.usefixtures("mapper"),
    pytest.mark.timeout(300),
]

NONE = Options(consistency="none")


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets for how many seconds track waits for the next write to end."""
    return lambda seconds: monkeypatch.setattr(generation, "_QUIET_SECONDS", seconds)


def gives_up(lab: Lab, path: str, reason: str) -> None:
    """As track does after half a minute, which is short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_DRAIN_SECONDS", 0.2)
        with pytest.raises(BlktrackError, match=reason):
            tracker.track(lab.store, path, None)
    with pytest.raises(NotTracked):
        tracker.find(lab.store, path)


def tracked(lab: Lab, path: str, release: Callable[[], None]) -> None:
    """Track while writes are on their way, which end while it waits: then no doubt is left."""
    waits = threading.Event()
    observer = Meanwhile("waiting for a moment", waits.set)
    with running(lambda: tracker.track(lab.store, path, None, observer)):
        try:
            wait_until(waits.is_set, "track to wait")
        finally:
            release()
    replica = str(lab.name("replica"))
    assert lab.sync(path, replica).mode == "initial"
    assert crash(lab, path, replica).mode == "nothing"
    identical(read_image(path), replica)


def test_writes_that_end_when_tracking_starts(
    shared: Lab, patience: Callable[[float], None]
) -> None:
    volume = delayed(shared)
    fill(volume.path)
    volume.hold()
    writers = Writers(volume.path)

    def release() -> None:
        writers.more(writers.threads, volume.release)
        patience(0.2)

    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        patience(PATIENCE)
        tracked(shared, volume.path, release)


def test_writes_that_began_before_tracking_and_end_after_the_copy(shared: Lab) -> None:
    """dm-delay holds them, which the kernel does not count: they are seen only when they end."""
    volume = delayed(shared)
    fill(volume.path)
    replica = str(shared.name("replica"))
    volume.hold()
    writers = Writers(volume.path)
    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        shared.track(volume.path)
        assert shared.sync(volume.path, replica).mode == "initial"
        assert volume.held == writers.threads
    last = crash(shared, volume.path, replica)
    assert last.mode == "resync"
    assert "8 writes ended that were not seen to begin" in last.reason
    identical(read_image(volume.path), replica)
    assert crash(shared, volume.path, replica).mode == "nothing"


def test_writes_that_wait_in_a_suspended_device_when_tracking_starts(shared: Lab) -> None:
    """They were seen to begin by nobody, and the kernel does not count them as in flight."""
    below = delayed(shared)
    volume = Volume(shared, below.path, SIZE)
    fill(volume.path)
    below.hold()
    volume.suspend()
    writers = Writers(volume.path)

    def release() -> None:
        volume.resume()
        below.release()

    with writers.running(1, release=release):
        wait_until(lambda: writers.are_blocked, "writers that wait")
        assert volume.device.in_flight == 0
        gives_up(shared, volume.path, "was suspended for")
        volume.resume()
        below.holds(writers.threads)
        gives_up(shared, volume.path, "had I/O in flight for")
        tracked(shared, volume.path, below.release)


@pytest.mark.parametrize("when", ["after", "within"])
def test_writes_in_flight_where_the_initial_copy_reads(shared: Lab, when: str) -> None:
    """They began when the device was tracked, and land after the copy or in the midst of it."""
    volume = delayed(shared)
    fill(volume.path)
    shared.track(volume.path)
    replica = str(shared.name("replica"))
    volume.hold()
    writers = Writers(volume.path)

    def land() -> None:
        if when == "within":
            writers.more(writers.threads, volume.release)

    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        report, _ = sync.sync(shared.store, volume.path, replica, NONE, Meanwhile("initial", land))
        assert report.mode == "initial"
        assert writers.ended == (writers.threads if when == "within" else 0)
    assert crash(shared, volume.path, replica).mode == "incremental"
    identical(read_image(volume.path), replica)
