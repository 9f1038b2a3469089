"""Writes that depend on each other, and what a point has to hold of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blktrack.units import KIB, SECTOR
from tests import sectors
from tests.blockdev import read_image, wait_until, write_direct
from tests.sectors import Image
from tests.workload import next_sequence

BLOCK = 4 * KIB
NEVER = 1 << 62


@dataclass
class Write:
    place: int  # in blocks
    number: int  # its sectors say it
    begun: int  # by the clock of all writers: after what had ended by then, so it may depend on it
    ended: int = NEVER


class Writers:
    """Threads that go round through places of their own, each with one direct write at a time."""

    def __init__(
        self, device: str, *, threads: int = 8, places: int = 1, first: int = 0, pause: float = 0.0
    ) -> None:
        """pause -- seconds between two writes of a thread, where they must not be too fast."""
        self.device, self.threads, self._pause = device, threads, pause
        self._places, self._first = places, first
        self._clock = itertools.count()
        self._writes: list[list[Write]] = [[] for _ in range(threads)]
        self._stop = threading.Event()
        self._ids: dict[int, int] = {}  # of the kernel
        self._errors: list[Exception] = []

    def now(self) -> int:
        return next(self._clock)

    @property
    def ended(self) -> int:
        return sum(write.ended != NEVER for chain in self._writes for write in chain)

    @property
    def are_blocked(self) -> bool:
        """Whether each thread sleeps in the kernel, in a write of its own."""
        return len(self._ids) == self.threads and all(map(_sleeps, self._ids.values()))

    def _work(self, thread: int, most: int) -> None:
        self._ids[thread] = threading.get_native_id()
        try:
            for count in range(most):
                if self._stop.wait(self._pause):
                    return
                place = self._first + thread * self._places + count % self._places
                write = Write(place, next_sequence(), self.now())
                self._writes[thread].append(write)
                data = sectors.make(place * BLOCK, BLOCK, write.number)
                write_direct(self.device, place * BLOCK, data)
                write.ended = self.now()
        except Exception as error:
            self._errors.append(error)

    @contextmanager
    def running(
        self, most: int = NEVER, *, release: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """`most` writes of each thread at most; at the end each does the one that it is in.

        release -- lets go of writes that are held.
        """
        threads = [
            threading.Thread(target=self._work, args=(number, most), daemon=True)
            for number in range(self.threads)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            while any(thread.is_alive() for thread in threads):
                if release:
                    release()
                for thread in threads:
                    thread.join(0.1)
        assert not self._errors, self._errors

    def more(self, count: int, release: Callable[[], None] | None = None) -> None:
        """Wait until so many more have ended."""
        wanted = self.ended + count
        if release:
            release()
        self.reach(wanted)

    def reach(self, count: int) -> None:
        """Wait until so many in all have ended."""
        wait_until(lambda: self.ended >= count, f"{count} writes")

    def check(self, replica: str | Path, since: int, until: int) -> int:
        """A point that was taken between two times holds what a power cut in between could leave.

        That is all that had ended before, nothing that began afterwards, and with each write, held
        in whole or in part, all that had ended when it began. How many are held.
        """
        numbers = _numbers(read_image(replica))
        held = [_Held(chain, numbers) for chain in self._writes if chain]
        for each in held:
            if (last := each.last) is None:
                continue
            assert last.begun < until, f"{last} began after {until}"
            for other in held:
                lacks = other.lacks
                assert lacks is None or lacks.ended > last.begun, f"{last} without {lacks}"
        for each in held:
            assert each.lacks is None or each.lacks.ended > since, f"{each.lacks} before {since}"
        return sum(each.count for each in held)


class _Held:
    """What an image holds of one thread's writes, of which each began when the last had ended."""

    def __init__(self, chain: list[Write], numbers: list[list[int]]) -> None:
        order = {write.number: at for at, write in enumerate(chain)}
        found = {
            write.place: [order.get(number, -1) for number in numbers[write.place]]
            for write in chain
        }
        oldest = {place: min(writes) for place, writes in found.items()}
        lacking = (at for at, write in enumerate(chain) if at > oldest[write.place])
        latest = max(max(writes) for writes in found.values())
        self.count = next(lacking, len(chain))
        self.last = chain[latest] if latest >= 0 else None  # the last held, in part at least
        # The first that is not held in whole.
        self.lacks = chain[self.count] if self.count < len(chain) else None


def _numbers(image: Image) -> list[list[int]]:
    """Which write each sector of each block is of; 0 where it is of none, or of another place."""
    words = image.view("<u8").reshape(-1, SECTOR // 8)
    known = (words[:, 0] == sectors.MAGIC) & (words[:, 1] == np.arange(0, len(image), SECTOR))
    rows: list[list[int]] = np.where(known, words[:, 2], 0).reshape(-1, BLOCK // SECTOR).tolist()
    return rows


def _sleeps(thread: int) -> bool:
    """Whether it is in uninterruptible sleep (proc_pid_stat(5)), as a write that waits is."""
    try:
        stat = Path(f"/proc/self/task/{thread}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(") ")[2][0] == "D"
