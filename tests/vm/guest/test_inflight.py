"""What is in flight on bio-based devices: held, suspended, under a new table, at the start.

Nothing here waits for time to pass. dm-delay holds writes for longer than a test takes and lets go
of them when it is suspended, and what else has to happen in between is waited for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from blktrack import sync
from blktrack.errors import BlktrackError, NoPoint, NotTracked
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker import generation, tracker
from blktrack.units import MIB, SECTOR
from tests import sectors
from tests.blockdev import PATIENCE, Lab, Silent, read_image, run, told, wait_until, write_direct
from tests.oracle import fill, missed
from tests.sectors import Image
from tests.vm.guest.stacks.lvm import logical
from tests.vm.guest.volume import Volume, delays
from tests.vm.guest.writers import BLOCK, Writers
from tests.workload import next_sequence

pytestmark = [
    pytest.mark.needs("root", "bpf", "dmsetup"),
    pytest.mark.machine("inflight"),
    pytest.mark.timeout(300),
]

SIZE = 8 * MIB
ATTEMPTS = 5
NONE = Options(consistency="none")


@pytest.fixture(scope="module", autouse=True)
def programs(attached: Lab) -> None:
    """A device is tracked for the whole module: to compile its programs takes an emulator long."""
    run("modprobe", "-a", "dm-mod", "dm-delay")
    size = MIB // SECTOR
    run("dmsetup", "create", "kept", "--table", f"0 {size} linear {attached.loop(MIB)} 0")
    attached.stack.callback(run, "dmsetup", "remove", "--retry", "kept")
    attached.track("/dev/mapper/kept")


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


# Held for long


def test_writes_that_are_held_while_syncs_run(shared: Lab) -> None:
    """A sync ships what was there; that which lands after it is left for the next one."""
    volume = delayed(shared)
    source = Source(shared, volume.path)
    volume.hold()
    writers = Writers(volume.path)
    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        assert shared.sync(volume.path, source.replica).mode == "incremental"
        _, count = source.point(writers)
        assert count == 0
        identical(source.before, source.replica)
        assert volume.held == writers.threads, "all the while"
    source.check()
    assert writers.check(source.replica, writers.now(), writers.now()) == writers.threads


@pytest.mark.parametrize(
    ("threads", "places"), [(1, 3), (8, 1), (8, 3)], ids=["chain", "again", "around"]
)
def test_a_point_while_held_writes_land(shared: Lab, threads: int, places: int) -> None:
    """What a round is about to read is written after its swap, by writes that depend on others."""
    volume = delayed(shared)
    source = Source(shared, volume.path)
    volume.hold()
    writers = Writers(volume.path, threads=threads, places=places)

    def land() -> None:
        """Each thread once around, and a step on: into what the swap before had as changed."""
        for _ in range(places + 1):
            writers.more(threads, volume.release)
            volume.holds(threads)

    with writers.running(release=volume.release):
        volume.holds(threads)
        land()
        report, first = source.point(writers, Meanwhile("incremental", land))
        assert report.rounds > 1, "what it read first was the state of no instant"
        _, second = source.point(writers)
        assert volume.held == threads
        assert second >= first >= threads * places
    source.check()


def test_points_while_writes_take_seconds(shared: Lab) -> None:
    """Each ends by itself, 2 s after it began, in the middle of whatever goes on."""
    volume = delayed(shared)
    source = Source(shared, volume.path)
    volume.hold(2000)
    writers = Writers(volume.path, places=64)
    counts = []
    with writers.running():
        for _ in range(3):
            writers.more(writers.threads // 2)
            counts.append(source.point(writers)[1])
            shared.sync(volume.path, source.replica)
    assert counts == sorted(counts)
    told(f"points of {counts} of {writers.ended} writes that took 2 s each")
    source.check()


# Suspended, under another table, of another size


@pytest.mark.parametrize(("option", "when"), [("", "within"), ("--noflush", "before")])
def test_a_sync_of_a_suspended_device_waits(shared: Lab, option: str, when: str) -> None:
    """Suspended before its swap, or between that and its reading, under writers."""
    volume = Volume(shared, shared.loop(SIZE), SIZE)
    source = Source(shared, volume.path)
    writers = paced(volume.path)
    begun = threading.Event()

    def suspend() -> None:
        volume.suspend(*option.split())
        wait_until(lambda: writers.are_blocked, "writers that wait")

    def begin() -> None:
        if when == "within":
            suspend()
        begun.set()

    with writers.running(release=volume.resume):
        writers.more(writers.threads)
        if when == "before":
            suspend()
        with running(lambda: source.point(writers, Meanwhile("incremental", begin))) as syncing:
            try:
                wait_until(begun.is_set, "the beginning of the reading")
                assert writers.are_blocked
                assert syncing.is_alive()
            finally:
                volume.resume()
        writers.more(writers.threads)
        source.point(writers)
    source.check()


def test_another_table_under_load(shared: Lab) -> None:
    """Another lower device, then a target of another kind: the data are the same, which nobody
    can know, so each is one resync."""
    lower, other = shared.loop(SIZE), shared.loop(SIZE)
    volume = Volume(shared, lower, SIZE)
    source = Source(shared, volume.path)
    writers = paced(volume.path)

    def move() -> None:
        volume.suspend()
        write_direct(other, 0, read_image(lower))
        volume.load("linear", f"{other} 0")
        volume.resume()

    def slow() -> None:
        volume.load("delay", delays(other, 20))
        volume.resume()

    with writers.running():
        for change in (move, slow):
            writers.more(writers.threads)
            remapped(source.point(writers, Meanwhile("incremental", change))[0])
            writers.more(writers.threads)
            assert source.point(writers)[0].mode == "incremental"
    assert not BlockDevice.find(lower).holders
    assert BlockDevice.find(other).holders == [volume.device.name]
    assert crash(shared, volume.path, source.replica).mode == "incremental"
    identical(read_image(volume.path), source.replica)


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_table_with_other_data(shared: Lab, when: str) -> None:
    """No write to the device tells of them. It comes before a sync, or after the swap of one."""
    other = shared.loop(SIZE)
    volume = Volume(shared, shared.loop(SIZE), SIZE)
    source = Source(shared, volume.path)
    write_direct(other, 0, sectors.make(0, SIZE, next_sequence()))

    def change() -> None:
        volume.load("linear", f"{other} 0")
        volume.resume()

    write_direct(volume.path, MIB, sectors.make(MIB, BLOCK, next_sequence()))
    if when == "before":
        change()
        report = crash(shared, volume.path, source.replica)
    else:
        report = crash(shared, volume.path, source.replica, Meanwhile("incremental", change))
    identical(read_image(volume.path), source.replica)
    remapped(report)
    write_direct(volume.path, MIB, sectors.make(MIB, BLOCK, next_sequence()))
    assert crash(shared, volume.path, source.replica).mode == "incremental"
    identical(read_image(volume.path), source.replica)


def test_a_table_that_came_while_it_was_stopped(shared: Lab) -> None:
    """With data that are the same where a fingerprint looks, here all of them."""
    other = shared.loop(SIZE)
    volume = Volume(shared, shared.loop(SIZE), SIZE)
    source = Source(shared, volume.path)
    fill(other)
    for arguments, mode in ((f"{volume.lower} 0", "nothing"), (f"{other} 0", "resync")):
        assert shared.blktrack("stop", volume.path).code == 0
        volume.load("linear", arguments)
        volume.resume()
        report = crash(shared, volume.path, source.replica)
        assert report.mode == mode, report
    assert "it had another device-mapper table" in report.reason


def remapped(report: SyncReport) -> None:
    assert report.mode == "resync"
    assert "device-mapper has another table for it" in report.reason


def logical_volume(lab: Lab) -> tuple[str, str]:
    """Its path, and what lvm calls it."""
    (path,) = logical(lab, SIZE)
    return path, "stackvg/lv"


@pytest.mark.needs("lvm")
def test_a_volume_that_grows_under_load(shared: Lab) -> None:
    """Before a sync, and between its swap and its reading; what is new is written at once."""
    path, name = logical_volume(shared)
    source = Source(shared, path)
    writers = paced(path, threads=4)

    def extend() -> None:
        run("lvextend", "-q", "-y", "-L", f"+{4 * MIB}b", name)
        beyond = Writers(path, threads=4, first=BlockDevice.find(path).size // BLOCK - 4)
        with beyond.running(1):
            beyond.reach(4)

    with writers.running():
        writers.more(8)
        extend()
        source.point(writers)
        writers.more(8)
        report, _ = source.point(writers, Meanwhile("incremental", extend))
        assert report.mode == "incremental"
        writers.more(8)
        source.point(writers)
    source.check()
    assert BlockDevice.find(path).size == SIZE + 8 * MIB


@pytest.mark.needs("lvm")
def test_a_volume_that_shrinks_under_load(shared: Lab) -> None:
    path, name = logical_volume(shared)
    source = Source(shared, path)
    writers = paced(path, threads=4)
    with writers.running():
        writers.more(8)
        run("lvreduce", "-q", "-y", "-f", "-L", f"-{4 * MIB}b", name)
        writers.more(8)
        report, _ = source.point(writers)
        assert report.mode == "resync"
        assert "the device shrank from 8 MiB to 4 MiB" in report.reason
        writers.more(8)
        report, _ = source.point(writers)
        assert report.mode == "incremental"
    crash(shared, path, source.replica)
    identical(read_image(path), source.replica)
    assert BlockDevice.find(path).size == SIZE - 4 * MIB


# In flight when tracking starts


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets for how many seconds track waits for the next write to end."""
    return lambda seconds: monkeypatch.setattr(generation, "_QUIET_SECONDS", seconds)


def gives_up(lab: Lab, path: str, reason: str) -> None:
    """As track does after half a minute, which is short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_DRAIN_SECONDS", 0.2)
        with pytest.raises(BlktrackError, match=reason):
            tracker.track(lab.store, path, None)
    with pytest.raises(NotTracked):
        tracker.find(lab.store, path)


def tracked(lab: Lab, path: str, release: Callable[[], None]) -> None:
    """Track while writes are on their way, which end while it waits: then no doubt is left."""
    waits = threading.Event()
    observer = Meanwhile("waiting for a moment", waits.set)
    with running(lambda: tracker.track(lab.store, path, None, observer)):
        try:
            wait_until(waits.is_set, "track to wait")
        finally:
            release()
    replica = str(lab.name("replica"))
    assert lab.sync(path, replica).mode == "initial"
    assert crash(lab, path, replica).mode == "nothing"
    identical(read_image(path), replica)


def test_writes_that_end_when_tracking_starts(
    shared: Lab, patience: Callable[[float], None]
) -> None:
    volume = delayed(shared)
    fill(volume.path)
    volume.hold()
    writers = Writers(volume.path)

    def release() -> None:
        writers.more(writers.threads, volume.release)
        patience(0.2)

    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        patience(PATIENCE)
        tracked(shared, volume.path, release)


def test_writes_that_began_before_tracking_and_end_after_the_copy(shared: Lab) -> None:
    """dm-delay holds them, which the kernel does not count: they are seen only when they end."""
    volume = delayed(shared)
    fill(volume.path)
    replica = str(shared.name("replica"))
    volume.hold()
    writers = Writers(volume.path)
    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        shared.track(volume.path)
        assert shared.sync(volume.path, replica).mode == "initial"
        assert volume.held == writers.threads
    last = crash(shared, volume.path, replica)
    assert last.mode == "resync"
    assert "8 writes ended that were not seen to begin" in last.reason
    identical(read_image(volume.path), replica)
    assert crash(shared, volume.path, replica).mode == "nothing"


def test_writes_that_wait_in_a_suspended_device_when_tracking_starts(shared: Lab) -> None:
    """They were seen to begin by nobody, and the kernel does not count them as in flight."""
    below = delayed(shared)
    volume = Volume(shared, below.path, SIZE)
    fill(volume.path)
    below.hold()
    volume.suspend()
    writers = Writers(volume.path)

    def release() -> None:
        volume.resume()
        below.release()

    with writers.running(1, release=release):
        wait_until(lambda: writers.are_blocked, "writers that wait")
        assert volume.device.in_flight == 0
        gives_up(shared, volume.path, "was suspended for")
        volume.resume()
        below.holds(writers.threads)
        gives_up(shared, volume.path, "had I/O in flight for")
        tracked(shared, volume.path, below.release)


@pytest.mark.parametrize("when", ["after", "within"])
def test_writes_in_flight_where_the_initial_copy_reads(shared: Lab, when: str) -> None:
    """They began when the device was tracked, and land after the copy or in the midst of it."""
    volume = delayed(shared)
    fill(volume.path)
    shared.track(volume.path)
    replica = str(shared.name("replica"))
    volume.hold()
    writers = Writers(volume.path)

    def land() -> None:
        if when == "within":
            writers.more(writers.threads, volume.release)

    with writers.running(1, release=volume.release):
        volume.holds(writers.threads)
        report, _ = sync.sync(shared.store, volume.path, replica, NONE, Meanwhile("initial", land))
        assert report.mode == "initial"
        assert writers.ended == (writers.threads if when == "within" else 0)
    assert crash(shared, volume.path, replica).mode == "incremental"
    identical(read_image(volume.path), replica)
