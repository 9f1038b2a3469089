"""Each device stack is tracked soundly, or refused with the reason why it cannot be.

One mix of changes is both oracles: each sector that differs was tracked, and a replica that was
synced meanwhile is the device in the end. Then a point under writes keeps their order.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from blktrack import sync
from blktrack.device import bypasses_bios
from blktrack.errors import Refused
from blktrack.extent import total
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker import tracker
from blktrack.units import KIB, MIB, SECTOR, format_size
from tests import sectors
from tests.blockdev import (
    Lab,
    Silent,
    flush,
    read_image,
    run,
    wait_until,
    write_direct,
    written_by_page,
)
from tests.oracle import fill, missed, repeating
from tests.vm.guest.stacks import STACKS, Stack
from tests.vm.matrix import CELL
from tests.workload import (
    FileMix,
    RawMix,
    make_filesystem,
    next_sequence,
    together,
    trim_mounted,
)

pytestmark = [
    pytest.mark.needs("root", "bpf", "ext4", "fio"),
    pytest.mark.machine("stacks"),
    pytest.mark.timeout(900),
]

SIZE = 12 * MIB
COUNT = 6  # changes in a mix: the processor is an emulated one
BLOCK, CHAIN = 4 * KIB, 1500  # of the writes whose order a point must keep

every_stack = pytest.mark.parametrize(
    "name",
    [pytest.param(each.name, marks=pytest.mark.needs(*each.tools)) for each in STACKS.values()],
)


def refusal(stack: Stack) -> str:
    """Why `track` does not take it on this kernel; "" if it does."""
    if stack.rw_page:
        return "page by page past the block layer" if written_by_page() else ""
    return stack.refused


@every_stack
def test_stack(
    shared: Lab, seed: int, name: str, record_property: Callable[[str, object], None]
) -> None:
    stack = STACKS[name]
    paths = stack.build(shared, SIZE)
    reason = refusal(stack)
    if reason:
        assert bool(stack.refused) or bypasses_bios(BlockDevice.find(paths[0]))
        with pytest.raises(Refused, match=reason):
            tracker.track(shared.store, paths[0], None)
        record_property(CELL, "refused")
        return
    with shared.fresh() as inner:  # what is tracked is let go before the stack is taken down
        target = str(inner.name("replica"))
        mixed = mix(inner, seed, paths, target)
        order = keeps_order(inner, paths[0], target)
    record_property(CELL, "tracked")
    record_property("measured", f"{mixed}; {order}")


def steps(
    lab: Lab, paths: list[str], seed: int, synced: Callable[[], None], *, patient: bool
) -> Iterator[tuple[str, Callable[[], None]]]:
    """A short form of tests.workload.phases, for fifty stacks on three kernels.

    synced -- waits for a sync that begins after it is called; patient -- for each that may matter
    """
    device = paths[0]
    mixes = [RawMix(path, seed + number) for number, path in enumerate([device, *paths])]
    # md raid5 and the origin of a snapshot, for two, take none.
    discards = BlockDevice.find(device).queue_number("discard_max_bytes") > 0
    for mix in mixes:
        if not discards:
            del mix.operations["discard"]

    def files() -> None:
        make_filesystem(device, "ext4")
        with lab.mounted(device) as folder:
            together([partial(FileMix(folder, seed + n).run, COUNT) for n in range(2)])
            run("sync", "-f", folder)
            rewrite(folder / "rewritten", synced)
            if patient:  # while it is mounted: later, the page cache of the device is empty
                synced()
            if discards:
                trim_mounted(folder)

    yield "bare", lambda: together([partial(mix.run, COUNT) for mix in mixes])
    yield "files", files


def mix(lab: Lab, seed: int, paths: list[str], target: str, *, patient: bool = False) -> str:
    device = paths[0]
    fill(device)
    watch = lab.track(device)
    assert lab.sync(device, target).mode == "initial"
    watch.look()
    before = read_image(device)
    differ = marked = 0
    reports: list[SyncReport] = []

    def synced() -> None:
        """The next sync to end may have begun before."""
        wanted = len(reports) + 2
        wait_until(lambda: len(reports) >= wanted, "two syncs")

    for phase, work in steps(lab, paths, seed, synced, patient=patient):
        with repeating(lambda: reports.append(lab.sync(device, target))):
            work()
        modes = {report.mode: report.reason for report in reports}
        assert modes.keys() <= {"incremental", "nothing"}, modes
        for path in paths:
            flush(path)
        after, look = read_image(device), watch.look()
        lost = missed(before, after, look.drained)
        assert not len(lost), f"{phase}: {len(lost)} sectors changed untracked, first {lost[:8]}"
        assert not any(look.losses.values()), (phase, look.losses)
        differ += len(sectors.differing(before, after)) * SECTOR
        marked += total(look.drained)
        before = after
    last = sync.sync(lab.store, device, target, Options(), Silent())[0]
    assert last.consistency == "crash"
    found = sectors.faults(read_image(device), read_image(target))
    assert not found, sectors.describe(found)
    return (
        f"{format_size(differ)} differ, {format_size(marked)} tracked, {len(reports)} syncs, "
        f"{sum(report.consistency == 'none' for report in reports)} of them under writes"
    )


def rewrite(path: Path, synced: Callable[[], None]) -> None:
    """In place, with a sync in between: who reads the device through its page cache has what it
    read before."""
    with path.open("wb") as file:
        for turn in range(2):
            file.seek(0)
            file.write(os.urandom(256 * KIB))
            file.flush()
            os.fsync(file.fileno())
            if turn == 0:
                synced()


class Chain:
    """Writes, each begun when the one before it has ended."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.first = next_sequence()
        self.ended = 0
        self.stop = threading.Event()

    def write(self) -> None:
        for number in range(CHAIN):
            data = sectors.make(number * BLOCK, BLOCK, self.first + number)
            write_direct(self.device, number * BLOCK, data)
            self.ended = number + 1
            if self.stop.wait(0.005):
                return

    def held(self, replica: str) -> list[bool]:
        """Which of the writes a replica holds, wholly or in part."""
        words = read_image(replica)[: CHAIN * BLOCK].view("<u8").reshape(-1, BLOCK // 8)
        wanted = itertools.count(self.first)
        return [int(row[2]) == number for row, number in zip(words.tolist(), wanted, strict=False)]


@contextmanager
def writing(chain: Chain) -> Iterator[None]:
    thread = threading.Thread(target=chain.write)
    thread.start()
    try:
        wait_until(lambda: chain.ended > 4, "some writes")
        yield
    finally:
        chain.stop.set()
        thread.join()


def keeps_order(lab: Lab, device: str, target: str) -> str:
    """A point under writes holds the first of them up to one, and all that had ended before it."""
    chain = Chain(device)
    begin = time.monotonic()
    with writing(chain):
        sure = chain.ended
        report = sync.sync(lab.store, device, target, Options(), Silent())[0]
        last = chain.ended
    assert report.consistency == "crash"
    held = chain.held(target)
    count = held.index(False)
    assert not any(held[count:]), f"write {count} is missing and a later one is there"
    assert sure <= count <= last + 1, (sure, count, last)
    return f"a point of {count} of {last} writes in {time.monotonic() - begin:.1f} s"
