"""Real block devices for tests, each in a laboratory of its own that leaves nothing behind.

A Lab has a folder and a BLKTRACK_ROOT in it, and with that its own pins: two runs never meet. What
it makes is undone in reverse order, whatever the test did.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blktrack import bitmap, linux, sync
from blktrack.bpf import abi, kernel, layout
from blktrack.bpf.btf import Btf
from blktrack.config import Paths
from blktrack.extent import ExtentArray
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.state import DeviceState, LinkState, Store
from blktrack.tracker import status, tracker
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.tracking import Tracking
from blktrack.units import MIB, SECTOR
from tests.needs import TOOL_PATH
from tests.sectors import Image

LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81  # linux/loop.h
TOP = Path(__file__).resolve().parent.parent
PATIENCE = 30.0  # seconds for what the kernel does behind our back: a deadline, never a pause


_OWN = itertools.count()  # loop devices of this process with a number of their own


def wait_until(met: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not met():
        assert time.monotonic() < deadline, f"{what} did not come to pass in {patience:.0f} s"
        time.sleep(0.005)


def run(*command: str | Path, stdin: str | None = None) -> str:
    """Standard output of a system tool. CalledProcessError if it fails, with its messages shown."""
    done = subprocess.run(
        [str(word) for word in command],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": TOOL_PATH},
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return done.stdout.strip()


@dataclass(frozen=True)
class Done:
    """A blktrack command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code in (0, 5), f"exit code {self.code}: {self.err}"
        return json.loads(self.out)


class Lab:
    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self._files = 0
        self.store = Store(Paths.from_environment())

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Lab]:
        """A lab of the same instance: what is tracked, made and attached in it ends with it."""
        before = {state.id for state in self.store.devices()}
        with contextlib.ExitStack() as stack:
            folder = self.name("lab")
            folder.mkdir()
            stack.callback(shutil.rmtree, folder)
            stack.callback(self._forget, before)
            try:
                yield Lab(folder, stack)
            finally:
                for state in self.store.devices():
                    if state.wanted and state.id not in before:
                        tracker.untrack(self.store, state.path)

    def _forget(self, known: set[str]) -> None:
        """The next device of a name is another one, with replicas of its own."""
        for state in self.store.devices():
            if state.id not in known:
                shutil.rmtree(self.store.lib(state.id))

    def name(self, kind: str) -> Path:
        self._files += 1
        return self.folder / f"{kind}{self._files}"

    def loop(self, size: int, *, sector: int = SECTOR, file: Path | None = None) -> str:
        """A loop device over a sparse file in memory."""
        file = file or self.name("disk")
        if not file.exists():
            with file.open("xb") as made:
                made.truncate(size)
        device = run("losetup", "--find", "--show", "--partscan", f"--sector-size={sector}", file)
        self.stack.callback(detach, device, file)
        # A read-only mark outlives the file it was meant for: whoever made it may have been killed.
        if Path(f"/sys/block/{Path(device).name}/ro").read_text(encoding="ascii").strip() != "0":
            run("blockdev", "--setrw", device)
        return device

    def own_loop(self, size: int, file: Path) -> str:
        """One of a number that nobody else finds free, to be detached and attached again."""
        number = 10_000 + (os.getpid() * 64 + next(_OWN)) % 1_000_000
        control = os.open("/dev/loop-control", os.O_RDWR)
        self.stack.callback(os.close, control)
        fcntl.ioctl(control, LOOP_CTL_ADD, number)
        self.stack.callback(fcntl.ioctl, control, LOOP_CTL_REMOVE, number)
        device = f"/dev/loop{number}"
        wait_until(lambda: Path(device).exists(), device)
        with file.open("xb") as made:
            made.truncate(size)
        run("losetup", "--partscan", device, file)
        self.stack.callback(detach, device, file)
        return device

    def partition(self, disk: str, number: int, start: int, length: int) -> str:
        """Any bytes of a disk as a partition. Told to the kernel alone: no table is needed."""
        run("addpart", disk, str(number), str(start // SECTOR), str(length // SECTOR))
        node = f"{disk}p{number}"
        wait_until(lambda: Path(node).exists(), node)
        return node

    def zram(self, size: int) -> str:
        control = Path("/sys/class/zram-control")
        number = (control / "hot_add").read_text(encoding="ascii").strip()
        folder = Path(f"/sys/block/zram{number}")

        def remove() -> None:
            # Whoever still has it open, a late probe of udev say, lets go of it.
            def gone() -> bool:
                with contextlib.suppress(OSError):
                    (folder / "reset").write_text("1", encoding="ascii")
                    (control / "hot_remove").write_text(number, encoding="ascii")
                return not folder.exists()

            wait_until(gone, f"the end of zram{number}")

        self.stack.callback(remove)
        (folder / "disksize").write_text(str(size), encoding="ascii")
        wait_until(lambda: Path(f"/dev/zram{number}").exists(), f"/dev/zram{number}")
        return f"/dev/zram{number}"

    def device(self, kind: str, size: int) -> list[str]:
        """One of fixtures.KINDS. A partition of odd edges is followed by the disk that it is on."""
        layout, _, sector = kind.partition("-")
        match layout:
            case "zram":
                return [self.zram(size)]
            case "loop":
                return [self.loop(size, sector=int(sector))]
        block = int(sector)
        disk = self.loop(size + 4 * MIB, sector=block)
        return [self.partition(disk, 1, 63 * block, size + 5 * block), disk]

    @contextlib.contextmanager
    def mounted(self, device: str, *options: str) -> Iterator[Path]:
        point = self.name("mount")
        point.mkdir()
        run("mount", *options, device, point)
        try:
            yield point
        finally:
            run("umount", point)

    def blktrack(
        self, *words: str | Path, env: Mapping[str, str] | None = None, top: Path = TOP
    ) -> Done:
        """Run the command line in a process of its own, from the sources below `top`."""
        command = [sys.executable, "-m", "blktrack", *(str(word) for word in words)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # what `send` writes is no text
            check=False,
            cwd=top,
            timeout=240,
            env={**os.environ, **(env or {})},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def sync(self, device: str, target: str | Path) -> SyncReport:
        """To a point of any consistency: most of what is tested does not wait for quiet."""
        options = Options(consistency="none")
        return sync.sync(self.store, device, str(target), options, Silent())[0]

    def status(self, device: str) -> dict[str, Any]:
        (found,) = status.status(self.store, device)
        return found.as_json()

    def track(self, device: str, granularity: int | None = None) -> Watch:
        tracker.track(self.store, device, granularity)
        return Watch(self.store, device)

    def untrack(self, device: str) -> None:
        tracker.untrack(self.store, device)


class Silent:
    """An observer of syncs who says nothing."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def phase(self, name: str, total: int) -> None: ...

    def done(self, count: int) -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)


TOLD: list[str] = []


def told(line: str) -> None:
    """Have a measurement printed at the end of the run."""
    TOLD.append(line)


@contextlib.contextmanager
def lab_in_memory(setenv: Callable[[str, str], None]) -> Iterator[Lab]:
    """`setenv` of a MonkeyPatch, or of `os.environ` in a program that ends with the lab."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="blktrack-test-", dir=memory))
        stack.callback(shutil.rmtree, folder)
        setenv("BLKTRACK_ROOT", str(folder / "root"))
        made = Lab(folder, stack)
        stack.callback(kernel.remove, made.store.paths.pins)
        yield made


def written_by_page() -> bool:
    """Whether this kernel may write zram and brd past the block layer."""
    with contextlib.closing(Btf()) as btf:
        return layout.has_rw_page(btf)


def detach(device: str, file: Path) -> None:
    """Detach a loop device if it is still ours. It happens at its last close: see it happen."""
    backing = Path(f"/sys/block/{Path(device).name}/loop/backing_file")

    def gone() -> bool:
        try:
            return backing.read_bytes().rstrip(b"\n") != os.fsencode(file)
        except OSError:
            return True

    if not gone():
        run("losetup", "--detach", device)
        wait_until(gone, f"the detaching of {device}")


def resize(device: str, file: Path, size: int) -> None:
    """Give a loop device another size."""
    os.truncate(file, size)
    run("losetup", "--set-capacity", device)


def read_image(path: str | Path) -> Image:
    """All bytes of a device or file, past the page cache where that is possible."""
    is_device = Path(path).is_block_device()
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if is_device else 0))
    try:
        size = linux.device_size(fd) if is_device else os.fstat(fd).st_size
        buffer = linux.Buffer(size)
        at = 0
        while at < size:
            got = os.preadv(fd, [buffer.view[at : min(at + 8 * MIB, size)]], at)
            assert got, f"{path} ended at {at} of {size}"
            at += got
    finally:
        os.close(fd)
    return buffer.array[:size]


def despite_collisions(settle: Callable[[], object]) -> None:
    """fsync or msync of a device written through the page cache and past it at the same time.

    A direct write that finds a page dirtied again right behind it cannot drop that page, and the
    kernel has the next fsync say EIO (dio_warn_stale_pagecache), though all data is written. What
    really fails fails again and again.
    """
    for _ in range(20):
        try:
            settle()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        else:
            return
    settle()


def flush(path: str) -> None:
    """Bring everything written to the device and leave nothing of it in the page cache."""
    fd = os.open(path, os.O_RDWR)
    try:
        despite_collisions(lambda: os.fsync(fd))
        linux.flush_buffers(fd)
    finally:
        os.close(fd)


def write_direct(path: str, offset: int, data: bytes | Image) -> None:
    """One direct write, in whole blocks of the device. It has ended on return."""
    with mmap.mmap(-1, max(len(data), 1)) as aligned:
        aligned[: len(data)] = bytes(data)
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
        try:
            with memoryview(aligned) as view, view[: len(data)] as part:
                assert os.pwritev(fd, [part], offset) == len(data)
        finally:
            os.close(fd)


class Watch:
    """A tracked device and a link whose pending set this test alone empties."""

    def __init__(self, store: Store, path: str, name: str = "watch") -> None:
        self.store, self.path = store, path
        self.link = LinkState(name, name, "")
        self._unseen = 0
        with self.open() as tracking, LinkSets(tracking, self.link, create=True):
            pass

    @property
    def state(self) -> DeviceState:
        return tracker.find(self.store, self.path)[0]

    @contextlib.contextmanager
    def open(self) -> Iterator[Tracking]:
        state, device = tracker.find(self.store, self.path)
        held = hold(self.store, state.id, self.path)
        with held, open_tracking(self.store, state, device) as tracking:
            yield tracking

    def look(self) -> Look:
        """Close the epoch; what changed since the last call of this or of `take`."""
        with self.open() as tracking, LinkSets(tracking, self.link) as sets:
            submitted, completed = plane(tracking, abi.SUBMITTED), plane(tracking, abi.COMPLETED)
            tracking.drain()
            found = sets.union(np.zeros(tracking.words, dtype=np.uint64))
            sets.pending.clear()
            drained = bitmap.extents(found, sets.granularity, sets.size)
            counters = tracking.counters()
        harmless = ("begun", "ended", "writes", "written", "early", "late")
        losses = {name: count for name, count in counters.items() if name not in harmless}
        unseen = counters["begun"] - counters["ended"]
        before, self._unseen = self._unseen, unseen
        return Look(submitted, completed, drained, losses, unseen - before)

    def take(self) -> ExtentArray:
        return self.look().drained

    def drain(self) -> None:
        """Close the epoch; what changed in it stays pending."""
        with self.open() as tracking:
            tracking.drain()


class Look(NamedTuple):
    """What an epoch and those before it left behind."""

    submitted: ExtentArray  # in the maps, just before the epoch was closed
    completed: ExtentArray
    drained: ExtentArray  # pending since the last look
    losses: dict[str, int]
    unseen: int  # bytes more than at the last look that were seen to begin and not to end


def plane(tracking: Tracking, number: int) -> ExtentArray:
    found = np.zeros(tracking.words, dtype=np.uint64)
    tracking.active.merge_into(number, found)
    return bitmap.extents(found, tracking.state.granularity, tracking.state.size)


def pairs(extents: ExtentArray | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """As plain numbers, to compare and to read."""
    return [(int(start), int(length)) for start, length in extents]
