"""Every point keeps the order of writes: of each chain it holds a prefix, and just enough of it.

At a point's time its swap has not begun, so all that had completed by then is there. A write that
was begun when the swap had ended is not: it is marked in the other map. Of what was begun in
between the replica may have any prefix.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blktrack import capture, sync
from blktrack.bpf.kernel import Kernel
from blktrack.errors import NoPoint
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker.tracking import Swap
from blktrack.units import MIB
from tests import chains
from tests.blockdev import TOP, Lab, Silent, read_image, run, told, wait_until
from tests.chains import CHAIN, Log, judge
from tests.sectors import Image

pytestmark = pytest.mark.needs("root", "loop", "bpf")

CHAINS, WRITERS = 6, 2
PACES = {"slow": 100.0, "brisk": 1000.0, "flat out": 0.0}
SIZES = {"ext4": 96 * MIB, "xfs": 320 * MIB}  # the least that mkfs takes, and room for the chains


class Swaps:
    """When the swaps of this process began, and when they had ended."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.ends: list[float] = []

    def end_of(self, point: float) -> float:
        """Of the swap of a point: the first that began at the point's time or later."""
        index = bisect.bisect_left(self.begins, point)
        return self.ends[index] if index < len(self.ends) else math.inf


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> Swaps:
    found, swap = Swaps(), Kernel.swap

    def timed(*arguments: Any) -> None:
        begun = time.time()
        swap(*arguments)
        found.ends.append(time.time())
        found.begins.append(begun)

    monkeypatch.setattr(Kernel, "swap", timed)
    return found


@contextlib.contextmanager
def writers(path: str, log: Path, pace: float) -> Iterator[Log]:
    """Processes that write chains until the end of the context."""
    record = Log(log, CHAINS)
    running = []
    try:
        for number in range(WRITERS):
            own = ",".join(str(chain) for chain in range(number, CHAINS, WRITERS))
            words = [path, str(log), own, str(CHAINS), str(pace / WRITERS)]
            command = [sys.executable, "-m", "tests.chains", *words]
            running.append(subprocess.Popen(command, cwd=TOP))
        wait_until(lambda: bool((record.done > 2).all()), "some writes of every chain")
        yield record
        assert all(process.poll() is None for process in running), "a writer has died"
    finally:
        for process in running:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Place:
    """A device, the path that the writers write to, and how the chains are got from a replica."""

    device: str
    path: str
    look: Callable[[Path], Image]


@contextlib.contextmanager
def place(lab: Lab, kind: str, consistency: str = "crash") -> Iterator[Place]:
    """loop or zram; with a file system, the chains are in a file of it: loop-ext4."""
    base, _, system = kind.partition("-")
    size = SIZES.get(system, CHAINS * CHAIN)
    device = lab.loop(size) if base == "loop" else lab.zram(size)
    if not system:
        yield Place(device, device, read_image)
        return
    run(f"mkfs.{system}", "-q", *["-b", "4096"] * (system == "ext4"), device)

    def check(image: Path) -> None:
        run(*["e2fsck", "-f"] if system == "ext4" else ["xfs_repair", "-f"], "-n", image)

    def look(replica: Path) -> Image:
        image = lab.name("image")
        copy(replica, image)
        if consistency == "filesystem" and system == "ext4":
            # As it is: xfs keeps its log under a freeze, to find what is unlinked but open.
            check(image)
        with lab.mounted(str(image), "-o", "loop,nouuid" if system == "xfs" else "loop") as seen:
            found = read_image(seen / "chains")
        check(image)
        image.unlink()
        return found

    with lab.mounted(device) as point:
        file = point / "chains"
        blocks = CHAINS * CHAIN // MIB
        run("dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={blocks}", "conv=fsync")
        yield Place(device, str(file), look)


def copy(replica: str | Path, to: Path) -> None:
    run("cp", "--sparse=auto", replica, to)


@dataclass
class Taken:
    """The points that were taken of a place, and what was wrong with them."""

    tried: int = 0
    rounds: int = 0
    freezes: list[float] = field(default_factory=list)  # seconds, of each point
    faults: list[str] = field(default_factory=list)
    swap: float = 0.0  # the longest from a point's time to the end of its swap

    @property
    def reached(self) -> int:
        return len(self.freezes)

    def __str__(self) -> str:
        reached = f"{self.reached} of {self.tried} reached"
        if not self.reached:
            return reached
        frozen = [seconds for seconds in self.freezes if seconds]
        under = f", {len(frozen)} under a freeze of at most {max(frozen):.3f} s" if frozen else ""
        return (
            f"{reached}{under}, all in order, in {self.rounds / self.reached:.1f} rounds each; "
            f"at most {1000 * self.swap:.0f} ms from a point to the end of its swap"
        )


def take(
    lab: Lab,
    at: Place,
    swaps: Swaps,
    pace: str,
    wanted: int,
    *,
    tries: int | None = None,
    consistency: str = "crash",
) -> Taken:
    """Take points under writers until so many are reached, or were tried, and judge each."""
    replica, kept, taken = str(lab.name("replica")), lab.name("kept"), Taken()
    options = Options(consistency=consistency)

    def synced() -> SyncReport:
        return sync.sync(lab.store, at.device, replica, options, Silent())[0]

    lab.track(at.device)
    lab.sync(at.device, replica)
    copy(replica, kept)
    with writers(at.path, lab.name("log"), PACES[pace]) as log:
        while taken.reached < wanted and taken.tried < (tries or wanted):
            taken.tried += 1
            try:
                report = synced()
            except NoPoint as error:
                assert error.exit_code == 4
                run("cmp", replica, kept)  # not touched
                continue
            assert report.consistency == ("filesystem" if report.freeze_s else consistency)
            taken.freezes.append(report.freeze_s)
            taken.rounds += report.rounds
            end = swaps.end_of(report.point)
            taken.swap = max(taken.swap, end - report.point)
            copy(replica, kept)
            image = at.look(kept)
            for chain in range(CHAINS):
                least, most = log.completed_before(chain, report.point), log.begun_by(chain, end)
                if fault := judge(image, chain, least, most).fault:
                    taken.faults.append(f"epoch {report.epoch}: {fault}")
    # The source quiet: all of it.
    synced()
    copy(replica, kept)
    image = at.look(kept)
    assert (image == read_image(at.path)).all()
    for chain in range(CHAINS):
        assert not judge(image, chain, int(log.done[chain]), int(log.begun[chain])).fault
    return taken


def needing(*kinds: str) -> list[Any]:
    """Kinds of places as parameters, with what they need."""
    needs = {"zram", "ext4", "xfs"}
    return [
        pytest.param(kind, marks=pytest.mark.needs(*sorted(needs.intersection(kind.split("-")))))
        for kind in kinds
    ]


raw = pytest.mark.parametrize("kind", needing("loop", "zram"))
mounted = pytest.mark.parametrize("kind", needing("loop-ext4", "loop-xfs", "zram-ext4", "zram-xfs"))
every_pace = pytest.mark.parametrize("pace", PACES)


def in_order(lab: Lab, kind: str, swaps: Swaps, pace: str, wanted: int, **options: Any) -> Taken:
    consistency = options.get("consistency", "crash")
    with place(lab, kind, consistency) as at:
        taken = take(lab, at, swaps, pace, wanted, **options)
    assert not taken.faults, "\n".join(taken.faults[:5])
    told(f"{consistency} points of {kind}, {pace}: {taken}")
    return taken


def of_a_device(lab: Lab, kind: str, swaps: Swaps, pace: str, times: int = 1) -> None:
    """Written fast there may be none, and nothing to freeze: then nothing happens."""
    if pace == "slow":
        wanted = 80 * times
        assert in_order(lab, kind, swaps, pace, wanted, tries=2 * wanted).reached == wanted
    else:
        in_order(lab, kind, swaps, pace, (40 if pace == "brisk" else 10) * times)


def of_a_file_system(lab: Lab, kind: str, swaps: Swaps, pace: str, times: int = 1) -> None:
    """Where it is written too fast, it is frozen."""
    wanted = 8 * times
    assert in_order(lab, kind, swaps, pace, wanted, tries=3 * wanted).reached == wanted


@raw
@every_pace
def test_points_of_a_device(shared: Lab, swaps: Swaps, kind: str, pace: str) -> None:
    of_a_device(shared, kind, swaps, pace)


@mounted
@every_pace
def test_points_of_a_file_system(shared: Lab, swaps: Swaps, kind: str, pace: str) -> None:
    of_a_file_system(shared, kind, swaps, pace)


@mounted
def test_points_under_a_freeze(shared: Lab, swaps: Swaps, kind: str) -> None:
    """They mount clean, too."""
    taken = in_order(shared, kind, swaps, "flat out", 4, tries=12, consistency="filesystem")
    assert taken.reached == 4 and all(taken.freezes)


@pytest.mark.soak
@every_pace
@raw
def test_points_of_a_device_for_long(shared: Lab, swaps: Swaps, kind: str, pace: str) -> None:
    of_a_device(shared, kind, swaps, pace, 20)


@pytest.mark.soak
@every_pace
@mounted
def test_points_of_a_file_system_for_long(shared: Lab, swaps: Swaps, kind: str, pace: str) -> None:
    of_a_file_system(shared, kind, swaps, pace, 20)


def test_a_freeze_of_a_quiet_source_is_staged_too(shared: Lab) -> None:
    """Nothing had changed, but the freeze itself writes."""
    device, replica = shared.loop(64 * MIB), shared.name("replica")
    run("mkfs.ext4", "-q", device)
    shared.track(device)
    shared.sync(device, replica)
    wanted = Options(consistency="filesystem")
    with shared.mounted(device) as point:
        for name in ("one", "two"):
            (point / name).write_text(name)
            report = sync.sync(shared.store, device, str(replica), wanted, Silent())[0]
            assert (report.mode, report.consistency) == ("incremental", "filesystem")
            report = sync.sync(shared.store, device, str(replica), wanted, Silent())[0]
            assert report.consistency == "filesystem"
            run("e2fsck", "-f", "-n", replica)
            with shared.mounted(str(replica), "-o", "loop,ro") as seen:
                assert (seen / name).read_text() == name
    link = shared.status(device)["links"][0]
    assert (link["state"], link["reason"]) == ("ready", "")


def without_validation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(capture.Source, "is_valid", lambda *_: True)


def written_meanwhile(device: BlockDevice) -> None:
    """Wait until a write that begins now has ended, if there are writers: more have ended than were
    in flight."""

    def ended() -> int:
        return int((device.sys / "stat").read_text().split()[4])  # Documentation/block/stat.rst

    enough, deadline = ended() + WRITERS + 1, time.monotonic() + 0.5
    while ended() < enough and time.monotonic() < deadline:
        time.sleep(0.0005)


def dated_as_the_first_round(patch: pytest.MonkeyPatch) -> None:
    whole = capture.capture

    def dated(source: capture.Source, swap: Swap, *others: Any, **options: Any) -> capture.Captured:
        written_meanwhile(source.device)  # so that there are further rounds
        found = whole(source, swap, *others, **options)
        return dataclasses.replace(found, swap=dataclasses.replace(found.swap, time=swap.time))

    patch.setattr("blktrack.round.capture", dated)


def dated_when_read(patch: pytest.MonkeyPatch) -> None:
    whole = capture.capture

    def dated(source: capture.Source, *others: Any, **options: Any) -> capture.Captured:
        found = whole(source, *others, **options)
        written_meanwhile(source.device)
        return dataclasses.replace(found, swap=dataclasses.replace(found.swap, time=time.time()))

    patch.setattr("blktrack.round.capture", dated)


# What is wrong, at which pace, and what is said of it.
MUTANTS = {
    "no validation": (without_validation, "flat out", "belongs below|completed before|begun by"),
    "dated early": (dated_as_the_first_round, "slow", "were begun by then"),
    "dated late": (dated_when_read, "slow", "were completed before"),
}


@raw
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(
    shared: Lab, swaps: Swaps, monkeypatch: pytest.MonkeyPatch, kind: str, mutant: str
) -> None:
    mutate, pace, symptom = MUTANTS[mutant]
    mutate(monkeypatch)
    tried, faults = 0, ""
    while not faults and tried < 50:
        with shared.fresh() as lab, place(lab, kind) as at:
            taken = take(lab, at, swaps, pace, 5)
        tried, faults = tried + taken.tried, "\n".join(taken.faults)
    assert re.search(symptom, faults), f"{tried} points, and this is wrong: {faults or 'nothing'}"


def test_the_judge_knows_right_from_wrong() -> None:
    import numpy as np

    image = np.zeros(CHAIN, dtype=np.uint8)
    sectors = image.view(chains._SECTOR).reshape(-1, 8)

    def put(number: int) -> None:
        block = int(chains.places(np.array([number]))[0])
        sectors[block]["magic"], sectors[block]["number"] = chains._MAGIC, number

    assert judge(image, 0, 0, 0) == chains.Verdict(0)
    for number in range(1, 101):
        put(number)
    assert judge(image, 0, 100, 100) == judge(image, 0, 0, 1000) == chains.Verdict(100)
    assert "101 were completed" in judge(image, 0, 101, 101).fault
    assert "some of 100, 99 were begun" in judge(image, 0, 0, 99).fault
    put(102)
    assert "belongs below 102" in judge(image, 0, 100, 102).fault
    put(101)
    block = int(chains.places(np.array([103]))[0])
    sectors[block]["magic"][3:], sectors[block]["number"][3:] = chains._MAGIC, 103
    assert judge(image, 0, 102, 103) == chains.Verdict(102), "the last one may be torn"
    assert "some of 103, 102 were begun" in judge(image, 0, 102, 102).fault
