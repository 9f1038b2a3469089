"""Random mixes of everything that changes a block device, and of what file systems do to one.

A mix is given by its seed; several run at once, so what they do to each other is not repeatable.
Data written to a bare device describes itself (tests/sectors.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import math
import mmap
import os
import random
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from blktrack import linux
from blktrack.ship import aio
from blktrack.units import KIB, MIB, SECTOR
from tests import sectors
from tests.blockdev import Lab, despite_collisions, flush, run

FITRIM = 0xC018_5879  # linux/fs.h
_DEPTH = 16  # asynchronous requests in flight
_SEQUENCE = itertools.count(1)


def next_sequence() -> int:
    """The number of a write that describes itself: no other of this process has it."""
    return next(_SEQUENCE)


class RawMix:
    """Changes of a device itself, at random places of every size from a sector to `largest`."""

    def __init__(self, path: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.path = path
        fd = os.open(path, os.O_RDONLY)
        self.size, self.block = linux.device_size(fd), linux.block_size(fd)
        os.close(fd)
        self.operations: dict[str, Callable[[], None]] = {
            "buffered": self.buffered,
            "direct": self.direct,
            "asynchronous": self.asynchronous,
            "mapped": self.mapped,
            "discard": self.discard,
            "zero": self.zero,
        }

    def run(self, turns: int | Iterable[object]) -> None:
        """So many changes, or one for each of `turns`."""
        self._buffered = os.open(self.path, os.O_RDWR)
        self._direct = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        self._memory = linux.Buffer(2 * MIB)
        self._queue = aio.RequestQueue(_DEPTH)
        try:
            for _ in range(turns) if isinstance(turns, int) else turns:
                self.operations[self.random.choice(list(self.operations))]()
            despite_collisions(lambda: os.fsync(self._buffered))
        finally:
            self._queue.close()
            os.close(self._direct)
            os.close(self._buffered)

    def place(self, unit: int, largest: int) -> tuple[int, int]:
        """Offset and length in whole units: small is as likely as large, and edges are liked."""
        top = math.log2(min(largest, self.size // 2) / unit)
        length = int(2 ** self.random.uniform(0, top)) * unit
        last = (self.size - length) // unit
        match self.random.randrange(16):
            case 0:
                return 0, length
            case 1:
                return last * unit, length
            case 2:  # across the edge of a word of 4 KiB granules
                edge = self.random.randrange(1, max(self.size // (256 * KIB), 2)) * 256 * KIB
                return min(max(edge - length // 2, 0) // unit, last) * unit, length
        return self.random.randrange(last + 1) * unit, length

    def sectors_for(self, offset: int, length: int) -> sectors.Image:
        return sectors.make(offset, length, next_sequence())

    def buffered(self) -> None:
        offset, length = self.place(SECTOR, MIB)
        os.pwrite(self._buffered, self.sectors_for(offset, length).data, offset)
        if self.random.random() < 0.5:
            despite_collisions(lambda: os.fsync(self._buffered))

    def direct(self) -> None:
        offset, length = self.place(self.block, MIB)
        self._memory.array[:length] = self.sectors_for(offset, length)
        written = os.pwritev(self._direct, [self._memory.view[:length]], offset)
        assert written == length

    def asynchronous(self) -> None:
        rows, at = [], 0
        for _ in range(self.random.randrange(2, _DEPTH + 1)):
            offset, length = self.place(self.block, 128 * KIB)
            self._memory.array[at : at + length] = self.sectors_for(offset, length)
            rows.append((offset, length, at))
            at += length
        table = np.array(rows, dtype=np.int64)
        moved = self._queue.move(self._direct, self._memory, table, write=True)
        assert (moved == table[:, 1]).all()

    def mapped(self) -> None:
        offset, length = self.place(mmap.PAGESIZE, 256 * KIB)
        with mmap.mmap(self._buffered, length, offset=offset) as memory:
            memory[:] = self.sectors_for(offset, length).tobytes()
            if self.random.random() < 0.5:
                despite_collisions(memory.flush)

    def discard(self) -> None:
        with _busy_is_fine():
            linux.discard(self._buffered, *self.place(self.block, 4 * MIB))

    def zero(self) -> None:
        with _busy_is_fine():
            linux.zero_out(self._buffered, *self.place(self.block, MIB))


@contextlib.contextmanager
def _busy_is_fine() -> Iterator[None]:
    """A range that another thread just dirtied in the page cache is refused (EBUSY)."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise


class FileMix:
    """What programs do to a file system: files made, written every way, moved, cut and removed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder / f"mix{seed}"
        self.folder.mkdir()
        self.names = itertools.count()
        self.files: list[Path] = []

    def run(self, count: int) -> None:
        changes = [self.append, self.overwrite, self.direct, self.mapped, self.punch, self.cut]
        moves = [self.rename, self.remove, self.move]
        for _ in range(count):
            if len(self.files) < 4 or self.random.random() < 0.25:
                self.create()
            elif self.random.random() < 0.7:
                self.random.choice(changes)(self.random.choice(self.files))
            else:
                self.random.choice(moves)(self.random.choice(self.files))

    def bytes(self, largest: int) -> bytes:
        return self.random.randbytes(int(2 ** self.random.uniform(0, math.log2(largest))))

    def create(self) -> None:
        path = self.folder / str(next(self.names))
        with path.open("wb") as file:
            file.write(self.bytes(MIB))
            if self.random.random() < 0.3:
                os.fsync(file.fileno())
        self.files.append(path)

    def append(self, path: Path) -> None:
        with path.open("ab") as file:
            file.write(self.bytes(256 * KIB))

    def overwrite(self, path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(self.random.randrange(path.stat().st_size + 1))
            file.write(self.bytes(64 * KIB))
            file.flush()
            os.fdatasync(file.fileno())

    def direct(self, path: Path) -> None:
        memory = linux.Buffer(64 * KIB)
        memory.array[:] = np.frombuffer(self.random.randbytes(64 * KIB), dtype=np.uint8)
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
        try:
            os.pwritev(fd, [memory.view], self.random.randrange(8) * 64 * KIB)
        finally:
            os.close(fd)

    def mapped(self, path: Path) -> None:
        if size := path.stat().st_size:
            with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
                data = self.bytes(min(size, 64 * KIB))[:size]
                at = self.random.randrange(size - len(data) + 1)
                memory[at : at + len(data)] = data
                memory.flush()

    def punch(self, path: Path) -> None:
        with path.open("r+b") as file:
            start = self.random.randrange(path.stat().st_size + 1)
            linux.punch_hole(file.fileno(), start, self.random.randrange(1, 256 * KIB))

    def cut(self, path: Path) -> None:
        os.truncate(path, self.random.randrange(2 * path.stat().st_size + 1))

    def rename(self, path: Path) -> None:
        """Over another file, as programs replace one."""
        victim = self.random.choice(self.files)
        if victim != path:
            path.replace(victim)
            self.files.remove(path)

    def move(self, path: Path) -> None:
        folder = self.folder / f"folder{self.random.randrange(8)}"
        folder.mkdir(exist_ok=True)
        moved = folder / path.name
        path.rename(moved)
        self.files[self.files.index(path)] = moved

    def remove(self, path: Path) -> None:
        path.unlink()
        self.files.remove(path)


def together(works: Iterable[Callable[[], None]]) -> None:
    """Run all at once; the first error of any is raised when all have ended."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def fio(path: str, *options: str) -> None:
    """Asynchronous direct writes by a program made for it."""
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    has_uring = not setting.exists() or setting.read_text(encoding="ascii").strip() == "0"
    run(
        "fio",
        "--name=load",
        f"--filename={path}",
        "--direct=1",
        f"--ioengine={'io_uring' if has_uring else 'libaio'}",
        "--iodepth=32",
        "--allow_file_create=0",
        *options,
    )


Phase = tuple[str, Callable[[], None]]


def raw_activity(paths: Sequence[str], seed: int, count: int) -> None:
    """Mixes on each path (a device, the disk it is part of) and fio on the first, all at once."""
    mixes = [RawMix(path, seed + number) for number, path in enumerate([*paths, paths[0]])]
    block = mixes[0].block
    options = [f"--bsrange={block}-128k", f"--blockalign={block}", f"--number_ios={4 * count}"]
    works: list[Callable[[], None]] = [functools.partial(mix.run, count) for mix in mixes]
    works.append(lambda: fio(paths[0], "--rw=randwrite", f"--randseed={seed}", *options))
    together(works)


def make_filesystem(path: str, kind: str) -> None:
    """Without the discard of everything, after which nothing could be missed."""
    options = ["-F", "-E", "nodiscard"] if kind == "ext4" else ["-f", "-K"]
    run(f"mkfs.{kind}", "-q", *options, path)


def file_activity(lab: Lab, path: str, seed: int, count: int) -> None:
    """Two mixes at once in the file system of a device."""
    with lab.mounted(path) as folder:
        together([functools.partial(FileMix(folder, seed + n).run, count) for n in range(2)])
        run("sync", "-f", folder)


def trim(lab: Lab, path: str) -> None:
    with lab.mounted(path) as folder:
        trim_mounted(folder)


def trim_mounted(folder: Path) -> None:
    """fstrim: discard what the file system does not use."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FITRIM, struct.pack("QQQ", 0, 2**64 - 1, 0))
    finally:
        os.close(fd)


def phases(
    lab: Lab, paths: Sequence[str], kind: str, seed: int, count: int = 60
) -> Iterator[Phase]:
    """A mix in steps; each leaves all it did on the device and nothing in the page cache."""
    path = paths[0]
    steps: list[Phase] = [
        ("bare", lambda: raw_activity(paths, seed, count)),
        ("mkfs", lambda: make_filesystem(path, kind)),
        ("files", lambda: file_activity(lab, path, seed, count)),
        ("trim", lambda: trim(lab, path)),
        ("files again", lambda: file_activity(lab, path, seed + 10, count)),
        ("bare again", lambda: raw_activity(paths, seed + 20, count)),
    ]
    for name, step in steps:
        yield name, functools.partial(_settled, step, paths)


def _settled(step: Callable[[], None], paths: Sequence[str]) -> None:
    step()
    for path in paths:
        flush(path)
