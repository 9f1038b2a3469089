"""What changes sources on logged disks, paced so that a point of them takes a few rounds."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from blktrack import linux
from blktrack.units import KIB
from tests.blockdev import despite_collisions, wait_until
from tests.workload import RawMix

LARGEST = 256 * KIB  # change: in rounds of more than that no point would be reached
MOST = 30  # rounds, after which there is no point


class Turns:
    """Goes on until it is stopped, with pauses, and counts.

    How fast a round is depends on the machine: it is adapted so that a point takes a few rounds.
    """

    def __init__(self, seed: int, pause: float) -> None:
        self._random, self._pause = random.Random(seed), pause
        self.stop = threading.Event()
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        for self.done in itertools.count(1):
            yield self.done
            if self.stop.wait(self._random.expovariate(1 / self._pause)):
                return

    def go_on(self, count: int) -> None:
        """Wait for so many turns."""
        until = self.done + count
        wait_until(lambda: self.done >= until, f"{count} changes", 120)

    def adapt(self, rounds: int) -> None:
        if rounds == 1:
            self._pause *= 0.7
        elif rounds > 3:
            self._pause *= 2


class OwnMix(RawMix):
    """Changes within some bytes that are nobody else's, so that the order of two that meet is
    known. A part of them go over one of `edges`."""

    def __init__(self, path: str, seed: int, start: int, length: int, edges: Sequence[int]) -> None:
        super().__init__(path, seed)
        self._start, self.size = start, length
        self._edges = [edge - start for edge in edges if start < edge < start + length]
        # A page may change while it is written, and then the log may have it as it was before and
        # the image as it was after: what is written through the cache is made to end at once.
        del self.operations["mapped"]

    def place(self, unit: int, largest: int) -> tuple[int, int]:
        start, length = super().place(unit, min(largest, LARGEST))
        if self._edges and self.random.random() < 0.2:
            start = self.random.choice(self._edges) - length // 2
            start = min(max(start, 0), self.size - length) // unit * unit
        return self._start + start, length

    def buffered(self) -> None:
        super().buffered()
        despite_collisions(lambda: os.fsync(self._buffered))

    def asynchronous(self) -> None:
        """At once, but none over another."""
        whole, count = (self._start, self.size), self.random.randrange(2, 9)
        self.size = self.size // count // self.block * self.block
        rows, at = [], 0
        try:
            for number in range(count):
                self._start = whole[0] + number * self.size
                start, length = self.place(self.block, 128 * KIB)
                self._memory.array[at : at + length] = self.sectors_for(start, length)
                rows.append((start, length, at))
                at += length
        finally:
            self._start, self.size = whole
        table = np.array(rows, dtype=np.int64)
        assert (
            self._queue.move(self._direct, self._memory, table, write=True) == table[:, 1]
        ).all()


class FileWork:
    """A few files that are made durable again and again, written past the cache, replaced."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.folder = random.Random(seed), folder / f"work{seed}"
        self.folder.mkdir()

    def run(self, turns: Turns) -> None:
        for _ in turns:
            path = self.folder / str(self.random.randrange(6))
            try:
                self.random.choice([self.replace, self.append, self.direct, self.punch])(path)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                path.unlink()

    def data(self) -> bytes:
        return self.random.randbytes(int(2 ** self.random.uniform(0, 17)))

    def replace(self, path: Path) -> None:
        new = path.with_name("new")
        with new.open("wb") as file:
            file.write(self.data())
            os.fsync(file.fileno())
        new.replace(path)

    def append(self, path: Path) -> None:
        with path.open("ab") as file:
            file.write(self.data())
            file.flush()
            if file.tell() > 512 * KIB:
                file.truncate(0)
            os.fdatasync(file.fileno())

    def direct(self, path: Path) -> None:
        memory = linux.Buffer(32 * KIB)
        memory.array[:] = np.frombuffer(self.random.randbytes(32 * KIB), dtype=np.uint8)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            os.pwritev(fd, [memory.view], self.random.randrange(8) * 32 * KIB)
        finally:
            os.close(fd)

    def punch(self, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            linux.punch_hole(fd, self.random.randrange(64 * KIB), 64 * KIB)
        finally:
            os.close(fd)
