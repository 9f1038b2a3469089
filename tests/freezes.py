"""Mounted file systems to freeze, a load on them, and no way to leave one frozen."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blktrack import linux
from blktrack.errors import BlktrackError
from blktrack.quiesce.find import file_systems
from blktrack.quiesce.freeze import Freeze
from blktrack.sysfs import BlockDevice
from blktrack.units import KIB, MIB
from tests.blockdev import Lab, wait_until
from tests.workload import make_filesystem

KINDS = [pytest.param(kind, marks=pytest.mark.needs(kind)) for kind in ("ext4", "xfs")]
SIZE = 320 * MIB  # mkfs.xfs makes none below 300 MiB
SLACK = 1.5  # seconds that a busy machine may be late


def let_go(point: Path) -> None:
    """The safety net: no test leaves a file system frozen, whatever it did."""
    fd = os.open(point, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            linux.thaw(fd)
    finally:
        os.close(fd)


def mount(lab: Lab, device: str, *options: str) -> Path:
    """Until the end of the test."""
    point = lab.stack.enter_context(lab.mounted(device, *options))
    lab.stack.callback(wait_until, lambda: not in_use(point), f"the end of the guards of {point}")
    lab.stack.callback(let_go, point)
    return point


def in_use(point: Path) -> bool:
    """Whether a process has it open: the guard of a process that was killed, for a moment."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if any(os.readlink(entry) == str(point) for entry in os.scandir(process / "fd")):
                return True
    return False


class Mounted:
    """A loop device with a file system on it, mounted until the end of the test."""

    def __init__(self, lab: Lab, kind: str = "ext4", device: str = "") -> None:
        self.path = device or lab.loop(SIZE)
        make_filesystem(self.path, kind)
        self.point = mount(lab, self.path)
        self.device = BlockDevice.find(self.path)

    def freeze(self, **options: Any) -> Freeze:
        return Freeze(self.device, functools.partial(file_systems, self.device), **options)

    @property
    def writes(self) -> int:
        """Begun by the device, as the block layer counts (Documentation/block/stat)."""
        fields = (self.device.sys / "stat").read_text(encoding="ascii").split()
        return int(fields[4]) + int(fields[8])

    @contextlib.contextmanager
    def frozen_by_another(self) -> Iterator[Callable[[], None]]:
        fd = os.open(self.point, os.O_RDONLY)
        linux.freeze(fd)
        try:
            yield lambda: linux.thaw(fd)
        finally:
            with contextlib.suppress(OSError):
                linux.thaw(fd)
            os.close(fd)


@pytest.fixture
def ext4(lab: Lab) -> Mounted:
    return Mounted(lab)


class Load:
    """Threads that write into a folder as fast as they can, with and without flushing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=[n]) for n in range(2)]

    def _write(self, number: int) -> None:
        data = os.urandom(64 * KIB)
        with (self.folder / f"load{number}").open("wb", buffering=0) as file:
            turn = 0
            while not self._stop.is_set():
                os.pwrite(file.fileno(), data, (turn * 37 % 512) * len(data))
                if number:
                    os.fdatasync(file.fileno())
                turn += 1
                self.done += 1

    def goes_on(self) -> None:
        before = self.done
        wait_until(lambda: self.done > before + 10, "a write")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
            if thread.is_alive():
                let_go(self.folder)
                thread.join()


def assert_thawed(mounted: Mounted) -> None:
    """And nobody is about to freeze it again."""
    fd = os.open(mounted.point, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            linux.thaw(fd)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EINVAL


def not_entered(freeze: Freeze, error: type[BlktrackError], match: str) -> BlktrackError:
    with pytest.raises(error, match=match) as caught, freeze:
        pytest.fail("entered")
    assert caught.value.hint
    return caught.value


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False
