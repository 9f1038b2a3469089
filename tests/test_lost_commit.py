"""A replica that committed, and a sync that died before its link knew: nothing is shipped twice."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from blktrack.report import SyncReport
from blktrack.state import LinkState
from blktrack.units import KIB, MIB
from tests import sectors
from tests.blockdev import Lab, read_image, write_direct
from tests.oracle import fill

pytestmark = pytest.mark.needs("root", "loop", "bpf")

SIZE = 8 * MIB
# Where the replica is at its new point, or will be as soon as it is opened.
COMMITTED = ["stage-sealed", "apply-copied", "apply-done", "commit-replica"]


class Pair:
    """A tracked device and its replica, of which some has changed since their last sync."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.device, self.replica = lab, lab.loop(SIZE), str(lab.name("replica"))
        self._writes = 0
        fill(self.device)
        lab.track(self.device)

    def write(self, *places: int) -> None:
        """4 KiB at each."""
        for place in places:
            self._writes += 1
            write_direct(self.device, place, sectors.make(place, 4 * KIB, self._writes))

    def die(self, point: str, *words: str) -> None:
        done = self.lab.blktrack(
            "sync", self.device, self.replica, *words, env={"BLKTRACK_CRASH": point}
        )
        assert done.code == -signal.SIGKILL, done.err

    def sync(self) -> SyncReport:
        done = self.lab.sync(self.device, self.replica)
        assert not sectors.faults(read_image(self.device), read_image(self.replica))
        assert self.link.sealing is None
        return done

    @property
    def link(self) -> LinkState:
        (state,) = [one for one in self.lab.store.devices() if one.path == self.device]
        return next(one for one in self.lab.store.links(state.id) if one.target == self.replica)


@pytest.fixture
def pair(shared: Lab) -> Pair:
    return Pair(shared)


WAYS = [*((point, []) for point in COMMITTED), ("commit-replica", ["--in-place"])]


@pytest.mark.parametrize(("point", "words"), WAYS)
def test_an_increment(pair: Pair, point: str, words: list[str]) -> None:
    pair.sync()
    pair.write(0, MIB, 3 * MIB)
    pair.die(point, *words)
    sealed = pair.link.sealing
    assert sealed is not None
    done = pair.sync()
    assert (done.mode, done.bytes_shipped) == ("nothing", 0)
    pair.write(5 * MIB)
    pair.die(point, *words)
    pair.write(MIB, 6 * MIB)
    done = pair.sync()
    assert (done.mode, done.extents, done.bytes_shipped) == ("incremental", 2, 8 * KIB)
    assert done.epoch > sealed.epoch


@pytest.mark.parametrize("words", [["--full"], []])
def test_a_whole_copy(pair: Pair, words: list[str]) -> None:
    if words:
        pair.sync()
    pair.die("commit-replica", *words)
    pair.write(MIB)
    done = pair.sync()
    assert (done.mode, done.bytes_shipped) == ("incremental", 4 * KIB)


def test_a_resync(pair: Pair) -> None:
    pair.sync()
    done = pair.lab.blktrack(
        "verify", pair.device, pair.replica, "--repair", env={"BLKTRACK_CRASH": "commit-replica"}
    )
    assert done.code == -signal.SIGKILL, done.err
    assert pair.link.phase == "resync"
    assert pair.sync().mode == "nothing"


def test_two_deaths(pair: Pair) -> None:
    """The second before what was shipped is cleared: it is shipped again, as of a later point."""
    pair.sync()
    pair.write(MIB)
    pair.die("commit-replica")
    pair.write(2 * MIB)
    pair.die("catch-up-recorded")
    done = pair.sync()
    assert (done.mode, done.bytes_shipped) == ("incremental", 8 * KIB)


def test_a_commit_that_never_was(pair: Pair) -> None:
    """The point was announced, and the replica is where it was."""
    pair.sync()
    pair.write(MIB)
    pair.die("sealing-recorded")
    pair.write(2 * MIB)
    done = pair.sync()
    assert (done.mode, done.bytes_shipped) == ("incremental", 8 * KIB)


def test_a_replica_that_went_back_after_its_commit(pair: Pair) -> None:
    """Its commit is undone by a backup of it: what had led there is shipped again."""
    pair.sync()
    folder, kept = Path(f"{pair.replica}.blktrack"), pair.lab.name("kept")
    shutil.copytree(folder, kept)
    before = bytes(read_image(pair.replica))
    pair.write(MIB)
    pair.die("commit-replica")
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    Path(pair.replica).write_bytes(before)
    assert pair.sync().mode in ("incremental", "resync")


def test_a_replica_that_was_written_to_after_its_commit(pair: Pair) -> None:
    pair.sync()
    pair.write(MIB)
    pair.die("commit-replica")
    with open(pair.replica, "r+b") as file:
        file.seek(MIB)
        file.write(b"others" * 100)
    done = pair.sync()
    assert done.mode == "resync"
    assert "it was written to by something else" in done.reason


def test_a_device_put_to_rest_in_between(pair: Pair) -> None:
    pair.sync()
    pair.write(MIB)
    pair.die("commit-replica")
    pair.write(2 * MIB)
    assert pair.lab.blktrack("stop", pair.device).code == 0
    assert pair.lab.blktrack("start", pair.device).code == 0
    # What was on its way is pending by now.
    done = pair.sync()
    assert (done.mode, done.bytes_shipped) == ("incremental", 8 * KIB)


def test_a_generation_that_ended_in_between(pair: Pair) -> None:
    pair.sync()
    pair.write(MIB)
    pair.die("commit-replica")
    pair.lab.untrack(pair.device)
    pair.write(2 * MIB)
    pair.lab.track(pair.device)
    done = pair.sync()
    assert (done.mode, done.bytes_shipped) == ("resync", 4 * KIB)
