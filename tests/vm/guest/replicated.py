"""A volume under writes that is tracked and replicated, and what may happen in its syncs.

Nothing here waits for time to pass: what else has to happen in between is waited for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blktrack import sync
from blktrack.errors import NoPoint
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.units import MIB
from tests import sectors
from tests.blockdev import Lab, Silent, read_image
from tests.oracle import fill, missed
from tests.sectors import Image
from tests.vm.guest.volume import Volume
from tests.vm.guest.writers import Writers

SIZE = 8 * MIB
ATTEMPTS = 5


class Source:
    """A volume with sectors of write 0, tracked and replicated: all that changes is watched."""

    def __init__(self, lab: Lab, path: str) -> None:
        self.lab, self.path = lab, path
        self.replica = str(lab.name("replica"))
        fill(path)
        self.watch = lab.track(path)
        assert lab.sync(path, self.replica).mode == "initial"
        self.watch.look()
        self.before = read_image(path)
        self.generation = self.watch.state.generation

    def point(self, writers: Writers, observer: Silent | None = None) -> tuple[SyncReport, int]:
        """A `crash` point under writers, checked; how many of their writes it holds."""
        for _ in range(ATTEMPTS):
            since = writers.now()
            # An emulated processor may be too slow for a point, and then there is none.
            with contextlib.suppress(NoPoint):
                report = crash(self.lab, self.path, self.replica, observer)
                return report, writers.check(self.replica, since, writers.now())
        raise AssertionError(f"no point in {ATTEMPTS} attempts")

    def check(self) -> None:
        """Nothing was missed, doubted or lost, now that writes have ended."""
        last = crash(self.lab, self.path, self.replica)
        assert last.mode in ("incremental", "nothing"), last
        after, look = read_image(self.path), self.watch.look()
        identical(after, self.replica)
        assert not any(look.losses.values()), look.losses
        assert self.watch.state.generation == self.generation
        lost = missed(self.before, after[: len(self.before)], look.drained)
        assert not len(lost), f"{len(lost)} sectors changed untracked, first {lost[:8]}"


def crash(lab: Lab, path: str, replica: str, observer: Silent | None = None) -> SyncReport:
    report = sync.sync(lab.store, path, replica, Options(), observer or Silent())[0]
    assert report.consistency == "crash"
    return report


def identical(image: Image, replica: str) -> None:
    found = sectors.faults(image, read_image(replica))
    assert not found, sectors.describe(found)


class Meanwhile(Silent):
    """Does something as often as a phase begins: after a swap and before what it found is read."""

    def __init__(self, phase: str, work: Callable[[], None], times: int = 1) -> None:
        super().__init__()
        self._phase, self._work, self._left = phase, work, times

    def phase(self, name: str, total: int) -> None:
        if name.startswith(self._phase) and self._left:
            self._left -= 1
            self._work()


@contextmanager
def running(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Work in a thread of its own, whose end is awaited and whose error is raised on leaving."""
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
    if errors:
        raise errors[0]


def delayed(lab: Lab) -> Volume:
    return Volume(lab, lab.loop(SIZE), SIZE, "delay")


def paced(path: str, threads: int = 8) -> Writers:
    """So many that a sync meets them at any time, and so slow that they come by a place again only
    after it: else there may be no point."""
    return Writers(path, threads=threads, places=256, pause=0.1)
