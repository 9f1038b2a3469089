"""What is said of a replica that cannot be had, or of a stream that it cannot take."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from blktrack.errors import BlktrackError, Interrupted, Refused
from blktrack.options import Options
from blktrack.point import Point
from blktrack.send import send
from blktrack.ship.claim import open_device
from blktrack.ship.delta import DeltaReader, DeltaWriter
from blktrack.ship.delta.errors import DeltaInvalid
from blktrack.ship.end import EndError
from blktrack.ship.endpoint import FileEnd
from blktrack.ship.pack import Packer
from blktrack.ship.stage import discard
from blktrack.ship.target import Target
from blktrack.units import MIB, SECTOR
from blktrack.verify import verify
from tests.background import UNSHARED, Running, assert_clear
from tests.blockdev import Lab, Silent
from tests.streams import LINK, Hosts
from tests.test_events import change, filled

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 4 * MIB


def test_a_replica_that_another_program_has(shared: Lab) -> None:
    device, replica = filled(shared, SIZE), shared.loop(SIZE)
    shared.track(device)
    fd = os.open(replica, os.O_RDONLY | os.O_EXCL)
    try:
        done = shared.blktrack("sync", device, replica)
        assert_clear(done, 1, f"{replica} is in use: another program has it", "release it")
    finally:
        os.close(fd)
    assert shared.sync(device, replica).mode == "initial"


def test_a_replica_that_is_a_program(shared: Lab) -> None:
    """One that runs: the kernel gives it to nobody who would write."""
    device, program = filled(shared, SIZE), shared.name("program")
    shutil.copy("/bin/sleep", program)
    shared.track(device)
    running = subprocess.Popen([program, "600"])
    try:
        done = shared.blktrack("sync", device, program)
        assert_clear(done, 1, f"cannot open {program}: Text file busy", "choose another")
    finally:
        running.kill()
        running.wait()
    assert program.read_bytes() == Path("/bin/sleep").read_bytes()


def test_a_replica_whose_name_becomes_another_device(shared: Lab) -> None:
    one, other = shared.loop(SIZE), shared.loop(SIZE)
    node = Path(f"/dev/blktrack-test-{os.getpid()}")
    shared.stack.callback(node.unlink, missing_ok=True)
    os.mknod(node, 0o600 | 0o060000, os.stat(one).st_rdev)
    target = Target.find(str(node))
    node.unlink()
    os.mknod(node, 0o600 | 0o060000, os.stat(other).st_rdev)
    with pytest.raises(Refused, match=f"{node} became another device") as caught:
        open_device(target, writable=True)
    assert caught.value.hint == "run the command again"


def test_what_is_staged_cannot_be_removed(shared: Lab) -> None:
    device, replica = filled(shared, SIZE), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    change(device, MIB)
    folder = Path(f"{replica}.blktrack")
    (folder / "incoming.pack").mkdir()
    done = shared.blktrack("sync", device, replica)
    assert_clear(done, 1, f"cannot remove {folder}", "Is a directory", "make it writable")
    (folder / "incoming.pack").rmdir()
    discard(folder)
    assert shared.sync(device, replica).mode == "incremental"


@pytest.mark.parametrize(
    ("blkid", "says", "remedy"),
    [
        ("", "blkid is missing", "install util-linux"),
        ("#!/bin/sh\necho it ails >&2\nexit 4\n", "blkid: it ails", "run blkid -p"),
    ],
    ids=["missing", "fails"],
)
def test_what_a_target_holds_is_not_known(shared: Lab, blkid: str, says: str, remedy: str) -> None:
    device, replica, tool = filled(shared, SIZE), shared.loop(SIZE), shared.name("blkid")
    shared.track(device)
    tool.write_text(blkid, encoding="utf-8")
    tool.chmod(0o755 if blkid else 0o644)
    script = f'set -e; for at in $(which -a blkid); do mount --bind {tool} $at; done; exec "$@"'
    prefix = (*UNSHARED, "sh", "-c", script, "sh")
    done = Running(shared, "sync", device, replica, prefix=prefix).end()
    assert_clear(done, 1, f"cannot tell what {replica} holds: {says}", remedy)
    assert shared.sync(device, replica).mode == "initial"


def test_a_pack_that_cannot_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    path.touch()
    sealed = os.memfd_create("pack", os.MFD_ALLOW_SEALING)
    os.ftruncate(sealed, MIB)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with FileEnd(str(path), writable=True) as end:
        os.dup2(sealed, end.fileno())  # a path that leads there is a link, which is not followed
        os.close(sealed)
        packer = Packer(end, MIB)
        with pytest.raises(EndError, match=r"cannot resize .*: Operation not permitted") as caught:
            packer.finish()
    assert "write protection" in caught.value.hint


def test_an_increment_for_a_replica_at_no_point(shared: Lab) -> None:
    hosts = Hosts(shared, SIZE)
    hosts.carry()
    hosts.change(MIB)
    increment, _ = hosts.sent()
    whole, _ = hosts.sent(Options(full=True))
    other = shared.name("other")
    assert hosts.recv(whole[:-100], target=other).code == 1
    done = hosts.recv(increment, target=other)
    assert_clear(done, 1, f"{other} is at no point", "blktrack send --full")
    assert hosts.recv(whole, target=other).code == 0


def test_a_replica_of_larger_blocks(shared: Lab) -> None:
    replica = shared.loop(2 * SIZE, sector=4096)
    hosts = Hosts(shared, SIZE + SECTOR, target=replica)
    delta, _ = hosts.sent()
    done = hosts.recv(delta)
    assert_clear(done, 1, f"{replica} has blocks of 4096 bytes", "use a file as the replica")


@pytest.mark.parametrize("how", ["parts", "generation", "back"])
def test_streams_that_make_no_sense(shared: Lab, how: str) -> None:
    """Whole, with every checksum right."""
    hosts = Hosts(shared, SIZE)
    hosts.carry()
    hosts.change(MIB)
    base, _ = hosts.sent(Options(full=how == "parts"))
    reader = DeltaReader(io.BytesIO(base))
    header, file = reader.header, io.BytesIO()
    point = Point(9999, header.source.generation, 1.0, "crash")
    says = {
        "parts": f"it is a full copy, and {SIZE} bytes of it are missing",
        "generation": "it leads to a point of another generation than its source's",
        "back": "it leads from epoch",
    }[how]
    match how:
        case "generation":
            point = replace(point, generation="another")
        case "back":
            point = replace(point, epoch=0)
    DeltaWriter(file, header).end(point, rounds=1)
    before = hosts.replica()
    target = shared.name("new") if how == "parts" else hosts.target
    done = hosts.recv(file.getvalue(), target=target)
    assert_clear(done, 1, says)
    assert hosts.replica() == before


def test_a_header_that_is_too_long(shared: Lab) -> None:
    hosts = Hosts(shared, SIZE)
    delta, _ = hosts.sent()
    header = DeltaReader(io.BytesIO(delta)).header
    long = replace(header, source=replace(header.source, device="x" * (1 << 20)))
    with pytest.raises(DeltaInvalid, match="bytes of JSON, and"):
        DeltaWriter(io.BytesIO(), long)


def test_a_stream_whose_tracking_begins_anew(shared: Lab) -> None:
    """While it is read."""
    hosts = Hosts(shared, 32 * MIB)  # more than is read ahead of what is written

    class Meddling(io.BytesIO):
        done = False

        def write(self, data: object, /) -> int:
            if self.tell() and not self.done:
                self.done = True
                shared.untrack(hosts.source)
                shared.track(hosts.source)
            return super().write(data)  # type: ignore[arg-type]

    file = Meddling()
    with pytest.raises(BlktrackError, match=r"the stream was cut off: .* began anew") as caught:
        send(shared.store, hosts.source, LINK, file, options=Options(), observer=Silent())
    assert "send again" in caught.value.hint
    assert hosts.recv(file.getvalue()).code == 1
    hosts.carry()
    assert hosts.identical()


def test_a_stop_before_what_waits_is_applied(shared: Lab) -> None:
    device, replica = filled(shared, SIZE), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    change(device, MIB)
    died = shared.blktrack("sync", device, replica, env={"BLKTRACK_CRASH": "stage-sealed"})
    assert died.code == -9
    options = Options(signum=signal.SIGTERM)
    options.stop.set()
    with pytest.raises(Interrupted) as caught:
        verify(shared.store, device, str(replica), options, Silent())
    assert caught.value.exit_code == 128 + signal.SIGTERM and caught.value.hint
    assert shared.blktrack("verify", device, replica).code == 0
