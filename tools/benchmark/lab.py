"""Where the benchmark measures: folders, loop devices in memory and processes, all gone afterwards.

The state is laid out as on a host: what has to survive a boot on a disk, the rest in memory. It is
this benchmark's own (BLKTRACK_ROOT), so that it meets no other blktrack on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blktrack import extent, linux
from blktrack.bpf import kernel
from blktrack.config import Paths
from blktrack.extent import ExtentArray
from blktrack.state import Store
from blktrack.units import GIB, KIB, MIB, format_size
from tools.benchmark.figure import Run

HERE = Path(__file__).resolve().parent
BLKTRACK = str(Path(sys.executable).parent / "blktrack")
BLOCK = 64 * KIB  # what is changed at once, at a random multiple of it
SPARE = GIB  # memory to leave to others


class Failed(Exception):
    """A step of the benchmark did not do what it has to, so its figure has no value."""


@dataclass(frozen=True)
class Disk:
    """A loop device and the file behind it."""

    path: str
    image: Path
    size: int

    @property
    def name(self) -> str:
        return Path(self.path).name

    def empty(self) -> None:
        """Give back the memory of all that was written: it reads as zeroes again."""
        with open(self.image, "r+b") as file:
            linux.punch_hole(file.fileno(), 0, self.size)


def run(*command: str, ok: tuple[int, ...] = (0,), text: str | None = None) -> str:
    """Standard output of a command; `text` is its input. It ends with us, whatever ends us."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(text)
    finally:
        stop(process)
    if process.returncode not in ok:
        raise Failed(f"{' '.join(command)}: exit {process.returncode}: {err.strip() or out}")
    return out


def stop(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> None:
    """End the processes of a session, patiently, then not."""
    for kind in (number, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def timed(*command: str) -> Run:
    """Run a command as its user would; `seconds` from its start to its exit, `peak_bytes`."""
    launch = [sys.executable, "-I", "-S", str(HERE / "launch.py")]
    done: Run = json.loads(run(*launch, *command))
    return done


def blktrack(*words: str) -> None:
    run(BLKTRACK, *words)


class Lab:
    """One benchmark's folders, devices and state."""

    def __init__(self, cleanup: contextlib.ExitStack, memory: Path, disk: Path) -> None:
        self._cleanup = cleanup
        self.memory = self._folder(memory)
        self.disk = self._folder(disk)
        root = self.disk / "state"
        root.mkdir()
        (self.memory / "run").mkdir()
        (root / "run").symlink_to(self.memory / "run")
        os.environ["BLKTRACK_ROOT"] = str(root)
        self.store = Store(Paths.from_environment())
        cleanup.callback(kernel.remove, self.store.paths.pins)
        self._random = np.random.Generator(np.random.SFC64())

    def _folder(self, where: Path) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="blktrack-bench-", dir=where))
        self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    @contextlib.contextmanager
    def device(self, size: int, *, filled: int | None = None) -> Iterator[Disk]:
        """A loop device of `size` bytes in memory, the first `filled` random, the rest a hole."""
        filled = size if filled is None else filled
        self.need(filled)
        fd, name = tempfile.mkstemp(prefix="disk-", dir=self.memory)
        image = Path(name)
        with contextlib.ExitStack() as stack:
            stack.callback(image.unlink, missing_ok=True)
            with os.fdopen(fd, "wb", buffering=0) as file:
                file.truncate(size)
                for _ in range(0, filled, 64 * MIB):
                    file.write(self.random_bytes(64 * MIB))
            path = run("losetup", "--find", "--show", name).strip()
            stack.callback(run, "losetup", "--detach", path, ok=(0, 1))
            yield Disk(path, image, size)

    def need(self, count: int) -> None:
        """Failed if that much memory, or room in the memory folder, is not free."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvail"))
        free = min(free, shutil.disk_usage(self.memory).free)
        if free < count + SPARE:
            raise Failed(f"{format_size(count + SPARE)} of memory needed, {format_size(free)} free")

    def random_bytes(self, count: int) -> memoryview:
        return self._random.integers(0, 1 << 64, count // 8, np.uint64).data.cast("B")

    @contextlib.contextmanager
    def tracked(self, disk: Disk) -> Iterator[None]:
        """Tracked as a user would: with the default granularity."""
        blktrack("track", disk.path)
        try:
            yield
        finally:
            run(BLKTRACK, "untrack", disk.path, ok=(0, 1, 2, 3))

    def change(self, disk: Disk, blocks: int) -> ExtentArray:
        """Write so many different random blocks of the device with random data, past the cache."""
        numbers = random.sample(range(disk.size // BLOCK), blocks)
        return self.fill(disk, [(number * BLOCK, BLOCK) for number in numbers])

    def fill(self, disk: Disk, places: list[tuple[int, int]]) -> ExtentArray:
        """Write these places of the device, in this order, with random data, past the cache."""
        buffer = linux.Buffer(max(length for _, length in places))
        fd = os.open(disk.path, os.O_WRONLY | os.O_DIRECT)
        try:
            for start, length in places:
                buffer.view[:length] = self.random_bytes(length)
                os.pwrite(fd, buffer.view[:length], start)
        finally:
            os.close(fd)
        return extent.from_pairs(places)

    @contextlib.contextmanager
    def mounted(self, disk: Disk, kind: str) -> Iterator[Path]:
        """A new file system on a device."""
        run(f"mkfs.{kind}", "-q", disk.path)
        with tempfile.TemporaryDirectory(prefix="mount-", dir=self.memory) as folder:
            run("mount", disk.path, folder)
            try:
                yield Path(folder)
            finally:
                run("umount", folder)


def same(one: Disk, other: Disk) -> None:
    """Failed unless both hold the same bytes. Only what is allocated in either is read."""
    with open(one.image, "rb") as a, open(other.image, "rb") as b:
        parts = [*linux.data_extents(a.fileno()), *linux.data_extents(b.fileno())]
        for start, length in extent.from_pairs(parts).tolist():
            for at in range(start, start + length, 4 * MIB):
                count = min(4 * MIB, start + length - at)
                if os.pread(a.fileno(), count, at) != os.pread(b.fileno(), count, at):
                    raise Failed(f"{one.path} and {other.path} differ near byte {at}")
