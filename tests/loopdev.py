"""Loop devices and file systems for tests, undone in reverse order whatever the test did."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import TOOL_PATH

MEMORY = "/dev/shm"


def run(*command: str | Path) -> str:
    """Standard output of a system tool."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": TOOL_PATH},
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


class Disks:
    """Makes devices in a folder of its own, in memory."""

    def __init__(self, folder: Path, held: contextlib.ExitStack) -> None:
        self.folder = folder
        self.held = held
        self._made = 0

    def name(self, kind: str) -> Path:
        self._made += 1
        return self.folder / f"{kind}{self._made}"

    def loop(
        self,
        size: int = 0,
        *,
        sector: int = 512,
        file: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> Path:
        """A loop device over a sparse file of `size` bytes, or over `file`."""
        if file is None:
            file = self.name("disk")
            file.touch()
            os.truncate(file, size)
        device = run("losetup", "--find", "--show", f"--sector-size={sector}", *options, file)
        self.held.callback(run, "losetup", "--detach", device)
        return Path(device)

    def mount(self, device: Path | None, kind: str, *options: str) -> Path:
        """A file system made on `device` and mounted; a tmpfs needs no device."""
        if device is not None:
            quiet = {"ext4": ("-q", "-F"), "xfs": ("-q", "-f")}[kind]
            run(f"mkfs.{kind}", *quiet, device)
        return self.attach(device, kind, *options)

    def attach(self, device: Path | None, kind: str, *options: str) -> Path:
        """Mount what is there already."""
        point = self.name("mount")
        point.mkdir()
        run("mount", "-t", kind, *options, device or "none", point)
        self.held.callback(run, "umount", point)
        return point


@contextlib.contextmanager
def disks_in_memory() -> Iterator[Disks]:
    with contextlib.ExitStack() as held:
        folder = held.enter_context(tempfile.TemporaryDirectory(dir=MEMORY, prefix="blktrack-"))
        yield Disks(Path(folder), held)


@pytest.fixture
def disks() -> Iterator[Disks]:
    with disks_in_memory() as made:
        yield made
