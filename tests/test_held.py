"""What a keeper holds of an increment that was cut off, as the link remembers it.

The sync dies or its stage goes; the next one ships what is not held there, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blktrack import extent, sync
from blktrack.capture import Source
from blktrack.extent import ExtentArray
from blktrack.options import Options
from blktrack.point import Point
from blktrack.ship.fields import Fields
from blktrack.ship.partial import JOURNAL
from blktrack.ship.remote.replica import RemoteReplica
from blktrack.ship.wire.errors import ConnectionLost
from blktrack.state import LinkState
from blktrack.sysfs import BlockDevice
from blktrack.tracker import status
from blktrack.tracker.link import LinkSets
from blktrack.tracker.live import Live
from blktrack.tracker.opening import hold, open_tracking
from blktrack.tracker.tracker import find
from blktrack.tracker.tracking import Swap
from blktrack.units import KIB, MIB
from tests import sectors
from tests.blockdev import Lab, Silent, read_image, resize, run, write_direct
from tests.campaign import HELD
from tests.farside import FarSide, pipe
from tests.oracle import fill

pytestmark = pytest.mark.needs("root", "loop", "bpf")

SIZE, CHANGED = 64 * MIB, 48 * MIB


@dataclass
class Kept:
    """A link's sets, as they were found."""

    link: LinkState
    shipping: ExtentArray
    held: ExtentArray


class Away:
    """A tracked device with a replica elsewhere, and an increment too large to be sent at once."""

    def __init__(self, lab: Lab, far: FarSide) -> None:
        self.lab, self.far, self.file = lab, far, lab.name("disk")
        self.device, self.target = lab.loop(SIZE, file=self.file), far.name()
        fill(self.device)
        lab.track(self.device)
        lab.sync(self.device, self.target)
        self._writes = 0
        self.write(MIB, CHANGED)

    def write(self, start: int, length: int = 4 * KIB) -> None:
        self._writes += 1
        write_direct(self.device, start, sectors.make(start, length, self._writes))

    def die(self, point: str, *words: str) -> None:
        done = self.lab.blktrack(
            "sync", self.device, self.target, *words, env={"BLKTRACK_CRASH": point}
        )
        assert done.code == -signal.SIGKILL, done.err

    def kept(self) -> Kept:
        state, device = find(self.lab.store, self.device)
        (link,) = self.lab.store.links(state.id)
        with (
            hold(self.lab.store, state.id, self.device),
            open_tracking(self.lab.store, state, device) as tracking,
            LinkSets(tracking, link) as sets,
        ):
            return Kept(link, sets.extents(), sets.held_extents())

    def cut(self) -> Kept:
        """Die when some of the increment is held elsewhere."""
        self.die("copy-checkpoint")
        kept = self.kept()
        assert len(kept.held) and len(kept.shipping)
        assert not extent.intersect(kept.held, kept.shipping)
        assert extent.total(extent.union(kept.held, kept.shipping)) == CHANGED
        return kept

    def finish(self, *, mode: str = "incremental", shipped: int | None = None) -> None:
        done = self.lab.sync(self.device, self.target)
        assert (done.mode, done.reason) == (mode, "")
        assert shipped in (None, done.bytes_shipped)
        self.assert_settled()

    def assert_settled(self) -> None:
        assert not sectors.faults(read_image(self.device), read_image(self.far.path()))
        kept = self.kept()
        assert not len(kept.shipping) and not len(kept.held)
        assert (kept.link.stage, kept.link.sealing) == ("", None)
        (listed,) = self.lab.status(self.device)["links"]
        assert (listed["state"], listed["pending_bytes"]) == ("ready", 0)

    @property
    def state(self) -> Path:
        """What is kept beside the replica."""
        return Path(f"{self.far.path()}.blktrack")


@pytest.fixture
def small(shared: Lab) -> Iterator[None]:
    """The replicas are on a file system of their own, which has room for two of them."""
    folder = shared.folder / "elsewhere" / "replicas"
    folder.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", f"size={3 * SIZE},mode=755", "far", folder)
    yield
    run("umount", folder)


@pytest.fixture
def away(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> Away:
    folder = shared.folder / "elsewhere"
    (folder / "replicas").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("BLKTRACK_SSH", pipe(folder))
    return Away(shared, FarSide("pipe", folder / "replicas", None))


def test_the_next_sync_ships_the_rest(away: Away) -> None:
    kept = away.cut()
    left = extent.total(kept.shipping)
    pending = away.lab.status(away.device)["links"][0]["pending_bytes"]
    assert pending == CHANGED, "what is held is not on the replica"
    assert status.extents(away.lab.store, away.device, None).bytes == CHANGED
    with contextlib.closing(Live(away.lab.store, [find(away.lab.store, away.device)[0].id])) as top:
        (device,) = top.look().devices
        assert [link.pending_bytes for link in device.links] == [CHANGED]
    # Once more of what is held, and once of what was never touched.
    again, fresh = int(kept.held[0, 0]), 0
    away.write(again)
    away.write(fresh)
    away.finish(shipped=left + 8 * KIB)
    away.finish(mode="nothing", shipped=0)


# Deaths of the sync that is cut off, and of the one that finds its stage gone.
@pytest.mark.parametrize("point", [*sorted(HELD), "copy-flushed", "sealing-recorded"])
def test_a_death_at(away: Away, point: str) -> None:
    if point == "held-returned":
        away.cut()
        (away.state / JOURNAL).unlink()
    away.die(point)
    away.write(0)
    away.write(2 * MIB)
    away.finish()


def test_a_commit_that_nobody_heard_of(away: Away) -> None:
    away.cut()
    away.die("commit-replica")
    away.write(0)
    away.finish(shipped=4 * KIB)


def test_a_stage_that_is_gone(away: Away) -> None:
    away.cut()
    (away.state / JOURNAL).unlink()
    away.finish(shipped=CHANGED)


def test_a_stage_that_takes_the_room_of_the_whole(small: None, away: Away) -> None:
    """It was changed again since: what is kept of it would be kept twice."""
    kept = extent.total(away.cut().held)
    away.write(MIB, CHANGED)
    room = os.statvfs(away.state)
    others = room.f_bavail * room.f_frsize - CHANGED + kept // 2
    run("fallocate", "-l", str(others), away.state.parent / "others")
    away.finish(shipped=CHANGED)


def test_a_stage_that_is_another(away: Away) -> None:
    """One of the same replica and point that this link knows nothing of."""
    kept = away.cut()
    state, _ = find(away.lab.store, away.device)
    kept.link.stage = "4e6f9a52-0d5e-4d3c-a3b1-000000000000"
    away.lab.store.save_link(state.id, kept.link)
    away.finish(shipped=CHANGED)


def test_a_stage_that_went_back(away: Away) -> None:
    """Its journal has lost what was staged last, as by damage or in a file system that was set
    back: all is covered still, by what is older."""
    away.die("sealing-recorded")
    journal = away.state / JOURNAL
    before = journal.stat().st_size
    away.write(MIB)
    away.die("sealing-recorded")
    assert journal.stat().st_size > before
    os.truncate(journal, before)
    away.finish(shipped=CHANGED)


@pytest.mark.parametrize("words", [["--in-place"], ["--full"]])
def test_another_way_to_ship(away: Away, words: list[str]) -> None:
    away.cut()
    done = away.lab.blktrack("sync", away.device, away.target, *words, "--json").json
    assert done["bytes_changed"] == (SIZE if words == ["--full"] else CHANGED)
    away.assert_settled()


def test_nothing_is_left_to_send(away: Away) -> None:
    """All of it is held when the sync dies: only its seal is missing."""
    away.die("sealing-recorded")
    kept = away.kept()
    assert (len(kept.shipping), extent.total(kept.held)) == (0, CHANGED)
    away.finish(shipped=0)


def test_a_device_put_to_rest(away: Away) -> None:
    kept = away.cut()
    assert away.lab.blktrack("stop", away.device).code == 0
    assert away.lab.blktrack("start", away.device).code == 0
    assert not len(away.kept().held)
    assert away.kept().link.stage == kept.link.stage
    away.finish(shipped=CHANGED)


@pytest.mark.parametrize("stage", ["there", "gone"])
def test_a_set_that_is_gone(away: Away, stage: str) -> None:
    """Alone, by a cleaner say: then what its stage had is known to nobody."""
    kept = away.cut()
    state, _ = find(away.lab.store, away.device)
    (away.lab.store.link_run(state.id, kept.link.id) / "held").unlink()
    if stage == "gone":
        (away.state / JOURNAL).unlink()
    assert away.lab.status(away.device)["links"][0]["pending_bytes"] == SIZE
    done = away.lab.sync(away.device, away.target)
    assert (done.mode, done.reason) == ("resync", "its pending set is gone")
    away.assert_settled()


def test_a_generation_that_ended(away: Away) -> None:
    kept = away.cut()
    away.lab.untrack(away.device)
    away.lab.track(away.device)
    state, _ = find(away.lab.store, away.device)
    assert not (away.lab.store.link_run(state.id, kept.link.id) / "held").exists()
    done = away.lab.sync(away.device, away.target)
    assert (done.mode, done.bytes_shipped) == ("resync", CHANGED)
    away.assert_settled()


def grow(away: Away) -> None:
    size = BlockDevice.find(away.device).size + MIB + 4 * KIB
    resize(away.device, away.file, size)
    away.write(size - 4 * KIB)


def test_a_device_that_has_grown(away: Away) -> None:
    away.cut()
    grow(away)
    away.finish()


def test_a_device_that_grows_once_its_replica_is_open(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    away.cut()
    take = RemoteReplica._take

    def take_and_grow(replica: RemoteReplica, found: Fields, *, writable: bool) -> None:
        take(replica, found, writable=writable)
        grow(away)

    monkeypatch.setattr(RemoteReplica, "_take", take_and_grow)
    assert away.lab.sync(away.device, away.target).mode == "incremental"
    away.assert_settled()


def test_a_device_that_grows_before_more_is_staged(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    away.cut()
    watch, times = LinkSets.watch, 0

    def watch_and_grow(sets: LinkSets) -> None:
        nonlocal times
        times += 1
        watch(sets)
        if times == 1:
            grow(away)

    monkeypatch.setattr(LinkSets, "watch", watch_and_grow)
    done = sync.sync(away.lab.store, away.device, away.target, Options(), Silent())[0]
    assert (done.mode, done.consistency) == ("incremental", "crash")
    assert times > 1
    away.assert_settled()


def test_a_device_that_grows_while_it_is_read(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was held is in a stage of the size that it had."""
    away.cut()
    judge, reads = Source.is_valid, 0

    def grow_and_judge(source: Source, swap: Swap, extents: ExtentArray) -> bool:
        nonlocal reads
        reads += 1
        if reads == 1:
            grow(away)
        return judge(source, swap, extents)

    monkeypatch.setattr(Source, "is_valid", grow_and_judge)
    done = sync.sync(away.lab.store, away.device, away.target, Options(), Silent())[0]
    assert (done.mode, done.consistency) == ("incremental", "crash")
    assert reads > 1
    away.assert_settled()


def test_a_full_copy_whose_commit_nobody_heard_of_is_not_made_again(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = RemoteReplica.commit

    def lost(replica: RemoteReplica, point: Point) -> None:
        monkeypatch.setattr(RemoteReplica, "commit", commit)
        commit(replica, point)
        raise ConnectionLost("far", "it ended")

    monkeypatch.setattr(RemoteReplica, "commit", lost)
    options = Options(full=True, retry_for=60.0)
    report = sync.sync(away.lab.store, away.device, away.target, options, Silent())[0]
    assert report.mode == "nothing"
    away.assert_settled()


def test_what_a_keeper_says_before_it_speaks_the_protocol(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    away.far.folder.chmod(0o777)
    serve = away.far.serve("--restrict", str(away.far.folder))
    monkeypatch.setenv("BLKTRACK_SSH", serve)
    done = away.lab.blktrack("sync", away.device, away.target)
    assert done.code == 1
    assert "far: everybody on this host may write in" in done.err and "chmod o-w" in done.err
