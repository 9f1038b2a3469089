"""Small file systems of a test, and what fills them or makes them read-only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack.device import device_id
from blktrack.sysfs import BlockDevice
from blktrack.units import KIB, MIB
from tests.blockdev import Lab, run

PAGE = 4 * KIB


def small_fs(lab: Lab, point: Path, size: int = MIB) -> Path:
    """A tmpfs mounted there until the end of the test."""
    point.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", point)
    lab.stack.callback(run, "umount", point)
    return point


def places(lab: Lab, device: str) -> tuple[Path, Path]:
    """Where the state of a device is and where its pending sets are, each a small file system."""
    number = device_id(BlockDevice.find(device))
    return small_fs(lab, lab.store.lib(number)), small_fs(lab, lab.store.run(number))


@contextlib.contextmanager
def full(folder: Path, *, left: int = 0) -> Iterator[None]:
    """Fill a small file system up to so many bytes."""
    filler = folder / "filler"
    fd = os.open(filler, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(fd, bytes(PAGE))
        os.ftruncate(fd, os.fstat(fd).st_size - left)
        yield
    finally:
        os.close(fd)
        filler.unlink()


@contextlib.contextmanager
def read_only(point: Path) -> Iterator[None]:
    run("mount", "-o", "remount,ro", point)
    try:
        yield
    finally:
        run("mount", "-o", "remount,rw", point)
