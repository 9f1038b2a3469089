"""Names that are no text: a path may be any bytes, and so may the name of a process.

Whatever the host has of them, blktrack works beside it; and what bears one is tracked and
replicated as any other.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack import use
from blktrack.bpf import kernel
from blktrack.config import Paths
from blktrack.sysfs import BlockDevice
from blktrack.units import MIB
from tests import sectors
from tests.blockdev import Done, Lab, read_image, run, write_direct
from tests.oracle import fill

pytestmark = pytest.mark.needs("root", "loop", "bpf", "ext4")

SIZE = MIB
# Latin-1, and what str.splitlines takes for the end of a line; a space is escaped by the kernel.
ODD = os.fsdecode(b"caf\xe9 \xe2\x80\xa8\x85")


@contextlib.contextmanager
def odd_mount(lab: Lab) -> Iterator[Path]:
    """Of a file system with no device, as that of a container's root: the table of mounts tells."""
    point = lab.folder / f"mount {ODD}"
    point.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", point)
    try:
        yield point
    finally:
        run("umount", point)


def changed(device: str, number: int) -> None:
    write_direct(device, 0, sectors.make(0, 64 * 1024, number))


def succeeds(lab: Lab, *words: str | Path, **env: str) -> Done:
    done = lab.blktrack(*words, env=env)
    assert (done.code, "Traceback" in done.err) == (0, False), (words, done)
    return done


def test_beside_odd_names(shared: Lab) -> None:
    """Other loop devices and mounts of the host have them."""
    shared.loop(SIZE, file=shared.folder / f"disk {ODD}")
    device, other = shared.loop(SIZE), shared.loop(SIZE)
    fill(device)
    replica = shared.name("replica")
    with odd_mount(shared):
        succeeds(shared, "track", device)
        for target in (str(replica), other):
            succeeds(shared, "sync", device, target)
        succeeds(shared, "stop", device)  # and start looks for who has it open
        succeeds(shared, "start", device)
        assert shared.blktrack("sync", device, replica, "--json").json["mode"] == "nothing"
        for words in (("status",), ("doctor",), ("verify", device, replica)):
            succeeds(shared, *words)
    assert not sectors.faults(read_image(device), read_image(other))


def test_what_bears_odd_names(shared: Lab) -> None:
    """The file behind the source, the replica and the mount that it is in."""
    device = shared.loop(SIZE, file=shared.folder / f"disk {ODD}")
    fill(device)
    succeeds(shared, "track", device)
    with odd_mount(shared) as point:
        replica = point / f"replica {ODD}"
        modes = []
        for number in range(1, 3):
            changed(device, number)
            modes.append(shared.blktrack("sync", device, replica, "--json").json["mode"])
        assert modes == ["initial", "incremental"]
        assert not sectors.faults(read_image(device), read_image(str(replica)))
        changed(device, 3)
        for command in ("sync", "verify"):
            succeeds(shared, command, device, replica)
        # As the byte that it is, which is no text.
        assert "caf\ufffd \u2028\ufffd" in succeeds(shared, "status").out
        for words in (["history", device], ["metrics"], ["status"]):
            succeeds(shared, *words, PYTHONIOENCODING="ascii")
        (told,) = shared.blktrack("status", device, "--json").json["devices"]
        assert [link["target"] for link in told["links"]] == [str(replica)]


def test_an_instance_of_an_odd_name(shared: Lab) -> None:
    device, replica, root = shared.loop(SIZE), shared.name("replica"), shared.folder / ODD
    shared.stack.callback(kernel.remove, Paths.below(root).pins)
    fill(device)
    for words in (("track", device), ("sync", device, replica), ("status",), ("untrack", device)):
        succeeds(shared, *words, BLKTRACK_ROOT=str(root))
    assert not sectors.faults(read_image(device), read_image(str(replica)))


def test_a_process_of_an_odd_name(shared: Lab) -> None:
    device = BlockDevice.find(shared.loop(SIZE))
    program = (
        "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff\\x85'); print(flush=True); input()"
    )
    with (
        open(device.path, "rb") as held,
        subprocess.Popen(
            [sys.executable, "-u", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[held.fileno()],
        ) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        found = use.opener(device)
        process.communicate(b"\n")
    assert os.fsencode(found) == b"\xff\x85 (process %d)" % process.pid
