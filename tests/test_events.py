"""Devices that are taken away, resized or write-protected under a command that uses them.

Each time the command says so in one sentence, and after mending the next sync brings the replica
up. Loop devices are resized for real; an open one cannot be taken away, so that is shown to the
command in a sysfs of its own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack import uevents
from blktrack.errors import CopyFailed, DeviceLost
from blktrack.sysfs import BlockDevice
from blktrack.uevents import Watch
from blktrack.units import KIB, MIB, SECTOR
from tests import sectors
from tests.background import UNSHARED, Running, assert_clear
from tests.blockdev import Lab, read_image, run, wait_until, write_direct
from tests.oracle import fill

pytestmark = pytest.mark.needs("root", "loop", "bpf")

SIZE = 8 * MIB
SLOW = ("--limit", "512K")  # a sixteenth of a second for each request: surely running


def change(device: str, offset: int, length: int = 64 * KIB, number: int = 1) -> None:
    write_direct(device, offset, sectors.make(offset, length, number))


def identical(device: str, replica: str | Path) -> bool:
    return not sectors.faults(read_image(device), read_image(replica))


def backing(device: str) -> Path:
    return Path(Path(f"/sys/block/{Path(device).name}/loop/backing_file").read_text().strip())


def resize(device: str, size: int) -> None:
    os.truncate(backing(device), size)
    run("losetup", "--set-capacity", device)


def filled(lab: Lab, size: int = SIZE) -> str:
    device = lab.loop(size)
    fill(device)
    return device


def test_a_source_that_shrinks(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, *SLOW)
    running.until_open(device, replica)
    resize(device, SIZE // 2)
    assert_clear(
        running.end(),
        1,
        f"the source {device} shrank from 8 MiB to 4 MiB while it was in use",
        "run the command again",
    )
    last = shared.sync(device, replica)
    assert last.mode in ("initial", "resync")
    assert replica.stat().st_size == SIZE // 2
    assert identical(device, replica)
    assert "shrank from 8 MiB to 4 MiB" in shared.status(device)["doubts"][0]["reason"]
    change(device, MIB)
    assert shared.sync(device, replica).mode == "incremental"
    assert identical(device, replica)


def test_a_source_that_loses_its_medium(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    running = Running(shared, "sync", device, replica, "--full", *SLOW)
    running.until_open(device, replica)
    kept = backing(device).read_bytes()
    resize(device, 0)
    assert_clear(running.end(), 1, f"the source {device} lost its medium", "attach")
    assert_clear(shared.blktrack("sync", device, replica), 1, f"{device} has no medium")
    backing(device).write_bytes(kept)
    run("losetup", "--set-capacity", device)
    assert shared.sync(device, replica).mode in ("initial", "resync")
    assert identical(device, replica)


def test_a_source_that_grows_is_no_error(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, "--limit", "4M", "--json")
    running.until_open(device, replica)
    resize(device, 2 * SIZE)
    done = running.end()
    assert (done.json["mode"], done.json["reason"]) == ("initial", "")
    assert identical(device, replica), "what is new of it came with the same sync"
    change(device, SIZE + MIB)
    grown = shared.sync(device, replica)
    assert grown.mode == "incremental"
    assert grown.bytes_changed < MIB
    assert identical(device, replica)


def test_a_source_that_is_detached_is_kept_to_the_end(shared: Lab) -> None:
    file = shared.name("disk")
    device, replica = shared.own_loop(SIZE, file), shared.name("replica")
    fill(device)
    shared.track(device)
    running = Running(shared, "sync", device, replica, "--limit", "4M", "--json")
    running.until_open(device, replica)
    run("losetup", "--detach", device)
    assert running.end().json["mode"] == "initial"
    # The last close has let it go; another loop device has the same identity, and a new sequence.
    wait_until(lambda: BlockDevice.find(device).size == 0, f"the detaching of {device}")
    assert_clear(shared.blktrack("sync", device, replica), 1, "has no medium", "attach")
    run("losetup", device, file)
    assert "was re-created" in str(shared.sync(device, replica).reason)
    assert identical(device, replica)


def test_a_partition_that_is_made_smaller(shared: Lab) -> None:
    disk = filled(shared, 16 * MIB)
    device, replica = shared.partition(disk, 1, MIB, SIZE), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, *SLOW)
    running.until_open(device, replica)
    # While it is open the kernel lets nobody delete it.
    with pytest.raises(subprocess.CalledProcessError):
        run("delpart", disk, "1")
    run("resizepart", disk, "1", str(SIZE // 2 // SECTOR))
    assert_clear(running.end(), 1, f"the source {device} shrank from 8 MiB to 4 MiB")
    run("resizepart", disk, "1", str(SIZE // SECTOR))
    assert shared.sync(device, replica).mode == "initial"
    assert identical(device, replica)


@pytest.mark.parametrize("command", ["sync", "verify"])
def test_a_replica_that_shrinks(shared: Lab, command: str) -> None:
    device, replica = filled(shared), shared.loop(SIZE)
    shared.track(device)
    if command == "verify":
        shared.sync(device, replica)
    kept = backing(replica).read_bytes()
    running = Running(shared, command, device, replica, *SLOW)
    running.until_open(device, replica)
    resize(replica, MIB)
    assert_clear(
        running.end(), 1, f"the replica {replica} shrank from 8 MiB to 1 MiB", "enlarge it"
    )
    assert_clear(shared.blktrack("sync", device, replica), 1, f"{replica} is too small")
    if command == "verify":
        backing(replica).write_bytes(kept)
    resize(replica, SIZE)
    shared.sync(device, replica)
    assert shared.blktrack("verify", device, replica, "--repair").code == 0
    assert identical(device, replica)


@pytest.mark.parametrize("changed", [False, True], ids=["initial", "incremental"])
def test_a_replica_that_becomes_read_only(shared: Lab, changed: bool) -> None:
    device, replica = filled(shared), shared.loop(SIZE)
    shared.track(device)
    if changed:
        shared.sync(device, replica)
        for number in range(16):
            change(device, number * SIZE // 16, SIZE // 32, number)
    running = Running(shared, "sync", device, replica, *SLOW)
    running.until_open(device, replica)
    run("blockdev", "--setro", replica)
    assert_clear(
        running.end(),
        1,
        f"the replica {replica} became read-only while it was in use",
        f"blockdev --setrw {replica}",
    )
    assert_clear(shared.blktrack("sync", device, replica), 1, f"{replica} is read-only")
    run("blockdev", "--setrw", replica)
    assert shared.sync(device, replica).mode == ("incremental" if changed else "initial")
    assert identical(device, replica)


def hidden(running: Running, folder: Path) -> None:
    running.inside("mount", "-t", "tmpfs", "none", folder)


def resequenced(running: Running, folder: Path) -> None:
    running.inside("mount", "--bind", "/proc/sys/kernel/pid_max", folder / "diskseq")


@pytest.mark.parametrize(
    ("role", "happens", "says"),
    [
        ("source", hidden, "was removed"),
        ("replica", hidden, "was removed"),
        ("source", resequenced, "was replaced by another medium"),
    ],
    ids=["source-removed", "replica-removed", "source-replaced"],
)
def test_a_device_that_is_taken_away(
    shared: Lab, role: str, happens: Callable[[Running, Path], None], says: str
) -> None:
    device, replica = filled(shared), shared.loop(SIZE)
    shared.track(device)
    running = Running(shared, "sync", device, replica, *SLOW, prefix=UNSHARED)
    running.until_open(device, replica)
    lost = device if role == "source" else replica
    happens(running, BlockDevice.find(lost).sys)
    # An event of the device, of which the kernel can be asked for one.
    Path(f"/sys/block/{Path(lost).name}/uevent").write_text("change", encoding="ascii")
    assert_clear(running.end(), 1, f"the {role} {lost} {says}", "run the command again")
    assert shared.sync(device, replica).mode == "initial"
    assert identical(device, replica)


@pytest.mark.parametrize("when", ["before", "after"])
def test_events_tell_at_once(shared: Lab, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Without a look each second; what nobody listened to yet is seen as well."""
    monkeypatch.setattr(uevents, "_EVERY", 600.0)
    source, replica = (BlockDevice.find(shared.loop(SIZE)) for _ in range(2))
    stop, subscribed = threading.Event(), threading.Event()
    subscribe = uevents._subscribe

    def subscribe_and_tell(held: contextlib.ExitStack) -> object:
        if when == "before":
            resize(replica.path, MIB)
        try:
            return subscribe(held)
        finally:
            subscribed.set()

    monkeypatch.setattr(uevents, "_subscribe", subscribe_and_tell)
    lost = pytest.raises(DeviceLost, match=r"the replica .* shrank")
    with lost, Watch(stop, source, replica):
        assert subscribed.wait(30)
        if when == "after":
            resize(source.path, 2 * SIZE)  # of no interest, as are those of others
            resize(shared.loop(MIB), 2 * MIB)
            resize(replica.path, MIB)
        assert stop.wait(30)
        raise CopyFailed("of no interest")


def test_without_events_there_is_a_look_now_and_then(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uevents, "_EVERY", 0.05)
    monkeypatch.setattr(uevents, "_subscribe", lambda held: None)
    source = BlockDevice.find(shared.loop(SIZE))
    stop = threading.Event()
    with pytest.raises(DeviceLost, match=r"the source .* shrank"), Watch(stop, source, None):
        resize(source.path, MIB)
        assert stop.wait(30)
        raise CopyFailed("of no interest")


def test_a_short_run_leaves_nothing_behind(shared: Lab) -> None:
    device = BlockDevice.find(shared.loop(SIZE))
    stop = threading.Event()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Watch(stop, device, None) as watch:
            pass
        assert not watch._thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(CopyFailed, match="its own"), Watch(stop, device, None):
        raise CopyFailed("its own")
    with pytest.raises(DeviceLost, match="shrank") as caught, Watch(stop, device, None):
        resize(device.path, MIB)
        raise CopyFailed("cannot read")
    assert isinstance(caught.value.__cause__, CopyFailed)
    assert stop.is_set()
