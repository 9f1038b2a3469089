"""Writes that dm-delay holds for longer than a sync takes, until it is suspended."""

from __future__ import annotations

import pytest

from tests.blockdev import Lab, told
from tests.vm.guest.replicated import Meanwhile, Source, delayed, identical
from tests.vm.guest.writers import Writers

pytestmark = [
    pytest.mark.needs("root", "bpf", "dmsetup"),
    pytest.mark.machine("inflight"),
    pytest.mark.usefixtures("mapper"),
    pytest.mark.timeout(300),
]


def test_writes_that_are_held_while_syncs_run(shared: Lab) -> None:
    """A sync ships what was there; that which lands after it is left for the next one."""
    volume = delayed(shared)
    source = Source(shared, volume.path)
    volume.hold()
    writers = Writers(volume.path)
    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        assert shared.sync(volume.path, source.replica).mode == "incremental"
        _, count = source.point(writers)
        assert count == 0
        identical(source.before, source.replica)
        assert volume.held == writers.threads, "all the while"
    source.check()
    assert writers.check(source.replica, writers.now(), writers.now()) == writers.threads


@pytest.mark.parametrize(
    ("threads", "places"), [(1, 3), (8, 1), (8, 3)], ids=["chain", "again", "around"]
)
def test_a_point_while_held_writes_land(shared: Lab, threads: int, places: int) -> None:
    """What a round is about to read is written after its swap, by writes that depend on others."""
    volume = delayed(shared)
    source = Source(shared, volume.path)
    volume.hold()
    writers = Writers(volume.path, threads=threads, places=places)

    def land() -> None:
        """Each thread once around, and a step on: into what the swap before had as changed."""
        for _ in range(places + 1):
            writers.more(threads, volume.release)
            volume.holds(threads)

    with writers.running(release=volume.release):
        volume.holds(threads)
        land()
        report, first = source.point(writers, Meanwhile("incremental", land))
        assert report.rounds > 1, "what it read first was the state of no instant"
        _, second = source.point(writers)
        assert volume.held == threads
        assert second >= first >= threads * places
    source.check()


def test_points_while_writes_take_seconds(shared: Lab) -> None:
    """Each ends by itself, 2 s after it began, in the middle of whatever goes on."""
    volume = delayed(shared)
    source = Source(shared, volume.path)
    volume.hold(2000)
    writers = Writers(volume.path, places=64)
    counts = []
    with writers.running():
        for _ in range(3):
            writers.more(writers.threads // 2)
            counts.append(source.point(writers)[1])
            shared.sync(volume.path, source.replica)
    assert counts == sorted(counts)
    told(f"points of {counts} of {writers.ended} writes that took 2 s each")
    source.check()
