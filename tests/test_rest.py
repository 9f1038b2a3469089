"""A clean stop and a start: the generation goes on, or the reason why not is found."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.units import KIB, MIB
from tests import sectors
from tests.blockdev import (
    LOOP_CTL_ADD,
    LOOP_CTL_REMOVE,
    Lab,
    detach,
    pairs,
    read_image,
    run,
    wait_until,
    write_direct,
)
from tests.oracle import fill

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 32 * MIB


class Host:
    """A tracked loop device with a replica, on a host that can be rebooted."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lab, self.monkeypatch = lab, monkeypatch
        self.file, self.replica = lab.name("disk"), str(lab.name("replica"))
        self.device = lab.own_loop(SIZE, self.file)
        fill(self.device)
        lab.track(self.device)
        lab.sync(self.device, self.replica)
        self.generation = lab.status(self.device)["generation"]
        self._writes = 0

    def write(self, offset: int) -> None:
        self._writes += 1
        write_direct(self.device, offset, sectors.make(offset, 4 * KIB, self._writes))

    def blktrack(self, *words: str, code: int = 0) -> str:
        done = self.lab.blktrack(*words)
        assert done.code == code, done.err
        return done.out or done.err

    def reboot(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """All that a boot changes: pins, /run, the device and its counters, the boot id."""
        run("rm", "-rf", self.lab.store.paths.pins)
        run("rm", "-rf", self.lab.store.paths.run)
        detach(self.device, self.file)
        control = os.open("/dev/loop-control", os.O_RDWR)
        number = int(self.device.removeprefix("/dev/loop"))
        try:
            wait_until(lambda: _tried(control, LOOP_CTL_REMOVE, number), "the end of the device")
            meanwhile()
            fcntl.ioctl(control, LOOP_CTL_ADD, number)
        finally:
            os.close(control)
        wait_until(lambda: Path(self.device).exists(), self.device)
        run("losetup", "--partscan", self.device, self.file)
        self.monkeypatch.setenv("BLKTRACK_BOOT_ID", f"after {os.environ.get('BLKTRACK_BOOT_ID')}")

    def write_elsewhere(self, offset: int) -> None:
        """As another system on this host would, to which blktrack is nothing."""
        with self.file.open("r+b") as disk:
            disk.seek(offset)
            disk.write(bytes(sectors.make(offset, 4 * KIB, 77)))

    def is_identical(self) -> bool:
        return not sectors.faults(read_image(self.device), read_image(self.replica))


def _backing(device: str) -> Path:
    name = Path(device).name
    return Path(Path(f"/sys/block/{name}/loop/backing_file").read_text(encoding="utf-8").strip())


def _tried(control: int, request: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        fcntl.ioctl(control, request, number)
        return True
    return False


@pytest.fixture
def host(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(lab, monkeypatch)


def test_a_generation_survives_a_clean_stop_and_a_boot(host: Host) -> None:
    host.write(MIB)
    assert host.blktrack("stop") == f"{host.device}: stopped\n"
    assert host.lab.status(host.device)["state"] == "stopped"
    host.reboot()
    assert host.lab.status(host.device)["state"] == "stopped"
    assert host.blktrack("start") == f"{host.device}: resumed\n"
    host.write(2 * MIB)
    found = host.lab.status(host.device)
    assert (found["state"], found["generation"]) == ("tracking", host.generation)
    assert not found["doubts"]
    listed = host.lab.blktrack("extents", host.device, "--json").json
    assert pairs(listed["extents"]) == [(MIB, 4 * KIB), (2 * MIB, 4 * KIB)]
    done = host.lab.sync(host.device, host.replica)
    assert (done.mode, done.bytes_shipped) == ("incremental", 8 * KIB)
    assert host.is_identical()


def test_stop_and_start_in_one_boot(host: Host) -> None:
    for number in range(3):
        host.write(number * MIB)
        host.blktrack("stop", host.device)
        assert host.blktrack("stop", host.device) == f"{host.device}: stopped, it was already\n"
        host.blktrack("start", host.device)
        assert host.blktrack("start", host.device) == f"{host.device}: tracking\n"
    done = host.lab.sync(host.device, host.replica)
    assert (done.mode, done.bytes_shipped) == ("incremental", 12 * KIB)
    assert host.is_identical()


def test_any_command_tracks_on(host: Host) -> None:
    host.write(MIB)
    host.blktrack("stop")
    assert host.lab.sync(host.device, host.replica).mode == "incremental"
    assert host.is_identical()


def test_a_resync_under_way_goes_on_after_a_boot(host: Host) -> None:
    """What `shipping` held is pending afterwards."""
    state = host.lab.store.devices()[0]
    (link,) = host.lab.store.links(state.id)
    folder = host.lab.store.link_run(state.id, link.id)
    host.write(3 * MIB)
    with contextlib.suppress(ZeroDivisionError):
        # A sync that ended after it had taken what was pending.
        host.monkeypatch.setattr("blktrack.replication.Replication.ship", lambda *_: 1 // 0)
        host.lab.sync(host.device, host.replica)
    host.monkeypatch.undo()
    host.monkeypatch.setenv("BLKTRACK_ROOT", str(host.lab.store.paths.run.parent.parent))
    assert (folder / "shipping").stat().st_blocks
    host.blktrack("stop")
    host.reboot()
    host.blktrack("start")
    done = host.lab.sync(host.device, host.replica)
    assert (done.mode, done.bytes_shipped) == ("incremental", 4 * KIB)
    assert host.is_identical()


def test_a_device_in_use_is_not_stopped(host: Host) -> None:
    run("mkfs.ext4", "-q", "-F", host.device)
    with host.lab.mounted(host.device) as point:
        assert f"in use, it is mounted at {point}" in host.blktrack("stop", code=6)
    fd = os.open(host.device, os.O_RDONLY)
    assert "in use, it is open in" in host.blktrack("stop", code=6)
    os.close(fd)
    found = host.lab.status(host.device)
    assert (found["state"], found["generation"]) == ("tracking", host.generation)
    host.reboot()
    out = host.blktrack("start")
    assert "began, the host was rebooted and had not stopped cleanly: it is open in" in out
    done = host.lab.sync(host.device, host.replica)
    assert done.mode == "resync"
    assert "had not stopped cleanly" in done.reason
    assert host.is_identical()
    assert host.lab.sync(host.device, host.replica).mode == "nothing"


def test_letting_go_leaves_nothing_in_the_kernel(host: Host) -> None:
    """The quiet device goes on where it was; one in use or away is compared."""
    quiet, kept = host.lab.loop(SIZE), str(host.lab.name("kept"))
    host.lab.track(quiet)
    host.lab.sync(quiet, kept)
    away = host.lab.loop(MIB)
    host.lab.track(away)
    detach(away, _backing(away))
    run("mkfs.ext4", "-q", "-F", host.device)
    with host.lab.mounted(host.device) as point:
        out = host.blktrack("stop", "--detach").splitlines()
        assert f"{host.device}: let go, it is mounted at {point}" in out
        assert f"{quiet}: stopped" in out
        assert f"{away}: let go, no device with its identity is there" in out
        assert not host.lab.store.paths.pins.exists()
        host.blktrack("stop", "--detach")
        out = host.blktrack("start").splitlines()
        assert f"{host.device}: began, it was let go: it is mounted at {point}" in out
        assert f"{quiet}: resumed" in out
    assert host.lab.sync(quiet, kept).mode == "nothing"
    assert host.lab.sync(host.device, host.replica).mode == "resync"
    assert host.is_identical()


def test_a_device_whose_name_is_anothers_after_a_boot(host: Host) -> None:
    """As those of NVMe disks: it is known by its permanent name, here its backing file."""
    host.write(MIB)
    host.blktrack("stop", host.device)
    before, elsewhere = host.device, host.lab.own_loop(MIB, host.lab.name("other"))

    def change() -> None:
        detach(elsewhere, _backing(elsewhere))
        run("losetup", elsewhere, host.file)
        host.lab.stack.callback(detach, elsewhere, host.file)

    host.reboot(change)
    detach(before, host.file)
    host.device = elsewhere
    assert host.blktrack("start", elsewhere) == f"{elsewhere}: resumed\n"
    assert host.lab.status(elsewhere)["state"] == "tracking"
    assert [
        status["device"] for status in host.lab.blktrack("status", "--json").json["devices"]
    ] == [elsewhere]
    done = host.lab.sync(elsewhere, host.replica)
    assert (done.mode, done.bytes_shipped) == ("incremental", 4 * KIB)
    assert host.is_identical()


def written_before(host: Host) -> None:
    host.reboot()
    host.write(5 * MIB)


def written_in_the_same_boot(host: Host) -> None:
    host.write(5 * MIB)


def written_by_another_system(host: Host) -> None:
    host.reboot(lambda: host.write_elsewhere(SIZE - 8 * KIB))


def written_where_it_was_written_last(host: Host) -> None:
    host.reboot(lambda: host.write_elsewhere(MIB))


def shrunk(host: Host) -> None:
    host.reboot(lambda: os.truncate(host.file, SIZE - MIB))


def sets_damaged(host: Host) -> None:
    host.reboot()
    for kept in host.lab.store.paths.lib.glob("devices/*/*.rest"):
        raw = bytearray(kept.read_bytes())
        raw[-3] ^= 1
        kept.write_bytes(raw)


@pytest.mark.parametrize(
    ("meanwhile", "reason"),
    [
        (written_before, "4 KiB had been written to it"),
        (written_in_the_same_boot, "4 KiB had been written to it"),
        (written_by_another_system, "its content was another"),
        (written_where_it_was_written_last, "its content was another"),
        (shrunk, "resized or moved"),
        (sets_damaged, "was damaged"),
    ],
)
def test_what_happens_at_rest_is_a_doubt(
    host: Host, meanwhile: Callable[[Host], None], reason: str
) -> None:
    host.write(MIB)
    host.blktrack("stop")
    meanwhile(host)
    out = host.blktrack("start")
    assert "began, stopped, and when tracking was to go on" in out
    assert reason in out
    found = host.lab.status(host.device)
    assert [reason in doubt["reason"] for doubt in found["doubts"]] == [True]
    done = host.lab.sync(host.device, host.replica)
    assert done.mode == "resync"
    assert reason in done.reason
    assert host.is_identical()
    host.write(6 * MIB)
    assert host.lab.sync(host.device, host.replica).mode == "incremental"


def test_what_was_not_counted_at_rest_is_a_doubt(host: Host) -> None:
    iostats = Path(f"/sys/block/{Path(host.device).name}/queue/iostats")
    host.blktrack("stop")
    iostats.write_text("0", encoding="ascii")
    assert "does not count what is written" in host.blktrack("start", code=1)
    iostats.write_text("1", encoding="ascii")
    out = host.blktrack("start")
    assert out.startswith(f"{host.device}: began, stopped")
    assert "the kernel keeps no count of its writes" in out
    assert host.lab.sync(host.device, host.replica).mode == "resync"


def test_untracking_forgets_a_rest(host: Host) -> None:
    host.blktrack("stop")
    host.blktrack("untrack", host.device)
    assert not list(host.lab.store.paths.lib.glob("devices/*/*rest*"))
    host.blktrack("track", host.device)
    assert host.lab.sync(host.device, host.replica).mode == "resync"


def test_a_source_that_went_back_to_where_it_was_stopped(host: Host) -> None:
    """As a virtual machine does: its disk and all that it remembers, but not its replica."""
    host.blktrack("stop", host.device)
    lib, kept = host.lab.store.paths.lib, host.lab.name("kept")
    shutil.copytree(lib, kept)
    before = host.file.read_bytes()
    host.blktrack("start", host.device)
    for place in (MIB, 2 * MIB):
        host.write(place)
        host.lab.sync(host.device, host.replica)
    host.blktrack("stop", host.device)

    def go_back() -> None:
        shutil.rmtree(lib)
        shutil.copytree(kept, lib)
        host.file.write_bytes(before)

    host.reboot(go_back)
    assert host.blktrack("start") == f"{host.device}: resumed\n"
    host.write(3 * MIB)
    done = host.lab.sync(host.device, host.replica)
    assert host.is_identical()
    assert (done.mode, done.bytes_shipped) == ("resync", 12 * KIB)
    assert "not at the point that it was brought to" in done.reason
