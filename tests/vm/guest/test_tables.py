"""Suspended, under another table, of another size: in the midst of syncs, under writers."""

from __future__ import annotations

import threading

import pytest

from blktrack.report import SyncReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker import service
from blktrack.units import MIB
from tests import sectors
from tests.blockdev import Lab, read_image, run, wait_until, write_direct
from tests.oracle import fill
from tests.vm.guest.replicated import (
    SIZE,
    Meanwhile,
    Source,
    crash,
    identical,
    paced,
    running,
)
from tests.vm.guest.stacks.lvm import logical
from tests.vm.guest.volume import Volume, delays
from tests.vm.guest.writers import BLOCK, Writers
from tests.workload import next_sequence

pytestmark = [
    pytest.mark.needs("root", "bpf", "dmsetup"),
    pytest.mark.machine("inflight"),
    pytest.mark.usefixtures("mapper"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize(("option", "when"), [("", "within"), ("--noflush", "before")])
def test_a_sync_of_a_suspended_device_waits(shared: Lab, option: str, when: str) -> None:
    """Suspended before its swap, or between that and its reading, under writers."""
    volume = Volume(shared, shared.loop(SIZE), SIZE)
    source = Source(shared, volume.path)
    writers = paced(volume.path)
    begun = threading.Event()

    def suspend() -> None:
        volume.suspend(*option.split())
        wait_until(lambda: writers.are_blocked, "writers that wait")

    def begin() -> None:
        if when == "within":
            suspend()
        begun.set()

    with writers.running(release=volume.resume):
        writers.more(writers.threads)
        if when == "before":
            suspend()
        with running(lambda: source.point(writers, Meanwhile("incremental", begin))) as syncing:
            try:
                wait_until(begun.is_set, "the beginning of the reading")
                assert writers.are_blocked
                assert syncing.is_alive()
            finally:
                volume.resume()
        writers.more(writers.threads)
        source.point(writers)
    source.check()


def test_another_table_under_load(shared: Lab) -> None:
    """Another lower device, then a target of another kind: the data are the same, which nobody
    can know, so each is one resync."""
    lower, other = shared.loop(SIZE), shared.loop(SIZE)
    volume = Volume(shared, lower, SIZE)
    source = Source(shared, volume.path)
    writers = paced(volume.path)

    def move() -> None:
        volume.suspend()
        write_direct(other, 0, read_image(lower))
        volume.load("linear", f"{other} 0")
        volume.resume()

    def slow() -> None:
        volume.load("delay", delays(other, 20))
        volume.resume()

    with writers.running():
        for change in (move, slow):
            writers.more(writers.threads)
            remapped(source.point(writers, Meanwhile("incremental", change))[0])
            writers.more(writers.threads)
            assert source.point(writers)[0].mode == "incremental"
    assert not BlockDevice.find(lower).holders
    assert BlockDevice.find(other).holders == [volume.device.name]
    assert crash(shared, volume.path, source.replica).mode == "incremental"
    identical(read_image(volume.path), source.replica)


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_table_with_other_data(shared: Lab, when: str) -> None:
    """No write to the device tells of them. It comes before a sync, or after the swap of one."""
    other = shared.loop(SIZE)
    volume = Volume(shared, shared.loop(SIZE), SIZE)
    source = Source(shared, volume.path)
    write_direct(other, 0, sectors.make(0, SIZE, next_sequence()))

    def change() -> None:
        volume.load("linear", f"{other} 0")
        volume.resume()

    write_direct(volume.path, MIB, sectors.make(MIB, BLOCK, next_sequence()))
    if when == "before":
        change()
        report = crash(shared, volume.path, source.replica)
    else:
        report = crash(shared, volume.path, source.replica, Meanwhile("incremental", change))
    identical(read_image(volume.path), source.replica)
    remapped(report)
    write_direct(volume.path, MIB, sectors.make(MIB, BLOCK, next_sequence()))
    assert crash(shared, volume.path, source.replica).mode == "incremental"
    identical(read_image(volume.path), source.replica)


def test_a_table_that_came_while_it_was_stopped(shared: Lab) -> None:
    """With data that are the same where a fingerprint looks, here all of them."""
    other = shared.loop(SIZE)
    volume = Volume(shared, shared.loop(SIZE), SIZE)
    source = Source(shared, volume.path)
    fill(other)
    for arguments, mode in ((f"{volume.lower} 0", "nothing"), (f"{other} 0", "resync")):
        (stopped,) = service.stop(shared.store, volume.path)
        assert stopped.action == "stopped", stopped
        volume.load("linear", arguments)
        volume.resume()
        report = crash(shared, volume.path, source.replica)
        assert report.mode == mode, report
    assert "it had another device-mapper table" in report.reason


def remapped(report: SyncReport) -> None:
    assert report.mode == "resync"
    assert "device-mapper has another table for it" in report.reason


def logical_volume(lab: Lab) -> tuple[str, str]:
    """Its path, and what lvm calls it."""
    (path,) = logical(lab, SIZE)
    return path, "stackvg/lv"


@pytest.mark.needs("lvm")
def test_a_volume_that_grows_under_load(shared: Lab) -> None:
    """Before a sync, and between its swap and its reading; what is new is written at once."""
    path, name = logical_volume(shared)
    source = Source(shared, path)
    writers = paced(path, threads=4)

    def extend() -> None:
        run("lvextend", "-q", "-y", "-L", f"+{4 * MIB}b", name)
        beyond = Writers(path, threads=4, first=BlockDevice.find(path).size // BLOCK - 4)
        with beyond.running(1):
            beyond.reach(4)

    with writers.running():
        writers.more(8)
        extend()
        source.point(writers)
        writers.more(8)
        report, _ = source.point(writers, Meanwhile("incremental", extend))
        assert report.mode == "incremental"
        writers.more(8)
        source.point(writers)
    source.check()
    assert BlockDevice.find(path).size == SIZE + 8 * MIB


@pytest.mark.needs("lvm")
def test_a_volume_that_shrinks_under_load(shared: Lab) -> None:
    path, name = logical_volume(shared)
    source = Source(shared, path)
    writers = paced(path, threads=4)
    with writers.running():
        writers.more(8)
        run("lvreduce", "-q", "-y", "-f", "-L", f"-{4 * MIB}b", name)
        writers.more(8)
        report, _ = source.point(writers)
        assert report.mode == "resync"
        assert "the device shrank from 8 MiB to 4 MiB" in report.reason
        writers.more(8)
        report, _ = source.point(writers)
        assert report.mode == "incremental"
    crash(shared, path, source.replica)
    identical(read_image(path), source.replica)
    assert BlockDevice.find(path).size == SIZE - 4 * MIB
