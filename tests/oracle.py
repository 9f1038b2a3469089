"""The checks of test_oracle.py, for a device of any kind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from blktrack.extent import ExtentArray, total
from blktrack.report import SyncReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker import status
from blktrack.units import MIB, SECTOR, format_size
from tests import sectors
from tests.blockdev import Lab, read_image, told, write_direct
from tests.sectors import Image
from tests.workload import phases


def fill(path: str) -> None:
    """Sectors of write 0 everywhere, so that a discard or a lost write shows."""
    size = BlockDevice.find(path).size
    for offset in range(0, size, 8 * MIB):
        write_direct(path, offset, sectors.make(offset, min(8 * MIB, size - offset), 0))


def missed(before: Image, after: Image, tracked: ExtentArray) -> NDArray[np.int64]:
    """The oracle: numbers of the sectors that differ and were not tracked."""
    return sectors.uncovered(sectors.differing(before, after), tracked)


@contextmanager
def repeating(work: Callable[[], object]) -> Iterator[None]:
    """Do it again and again meanwhile, at least once."""
    end = threading.Event()
    errors: list[Exception] = []

    def repeat() -> None:
        try:
            while True:
                work()
                if end.is_set():
                    return
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    if errors:
        raise errors[0]


def cover(
    lab: Lab,
    seed: int,
    paths: Sequence[str],
    filesystem: str,
    *,
    epochs: str = "many",
    count: int = 60,
) -> None:
    """Each byte of the first of `paths` that changes is tracked, whichever path the change takes.

    With "many" epochs the marks are drained all the while; `count` changes of each kind are made.
    """
    device = paths[0]
    fill(device)
    watch = lab.track(device)
    before = read_image(device)
    differ = marked = 0
    for phase, work in phases(lab, paths, filesystem, seed, count):
        if epochs == "many":
            with repeating(watch.drain):
                work()
        else:
            work()
        after = read_image(device)
        listed = status.extents(lab.store, device, None).extents
        look = watch.look()
        assert listed == look.completed.tolist()
        tracked = look.drained
        lost = missed(before, after, tracked)
        assert not len(lost), f"{phase}: {len(lost)} sectors changed untracked, first {lost[:8]}"
        differ += len(sectors.differing(before, after)) * SECTOR
        marked += total(tracked)
        before = after
    assert not any(watch.look().losses.values())
    told(
        f"{device}, {epochs} epoch(s): {format_size(differ)} differ, all of it tracked, and "
        f"{100 * (marked - differ) / differ:.0f} % more"
    )


def replicate(
    lab: Lab, seed: int, paths: Sequence[str], filesystem: str, target: str, *, count: int = 60
) -> None:
    """The replica `target` is the first of `paths` in the end, after syncs while it was changed."""
    device = paths[0]
    fill(device)
    size = BlockDevice.find(device).size
    assert lab.blktrack("track", device).code == 0
    assert lab.blktrack("sync", device, target, "--json").json["mode"] == "initial"
    reports: list[SyncReport] = []
    for _, work in phases(lab, paths, filesystem, seed, count):
        # In this process, where a sync takes no time to start: many a phase.
        with repeating(lambda: reports.append(lab.sync(device, target))):
            work()
    assert {report.mode for report in reports} <= {"incremental", "nothing"}, reports
    last = lab.blktrack("sync", device, target, "--json").json
    found = sectors.faults(read_image(device), read_image(target))
    assert not found, sectors.describe(found)
    assert last["consistency"] == "crash"
    assert lab.blktrack("verify", device, target).code == 0
    shipped = sum(report.bytes_shipped for report in reports) + last["bytes_shipped"]
    told(
        f"{device} to {target}: identical after {len(reports)} syncs, of which "
        f"{sum(report.consistency == 'none' for report in reports)} under writes; "
        f"{format_size(shipped)} shipped after the initial {format_size(size)}"
    )
