"""Increments for which there is no room beside their replica, and those written in place."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack import capture, sync
from blktrack.capture import Source
from blktrack.errors import BlktrackError, NoPoint
from blktrack.options import Options
from blktrack.rates import Rates
from blktrack.ship.apply import finish
from blktrack.ship.place import folder_of
from blktrack.ship.record import Record, State
from blktrack.ship.room import NoRoom
from blktrack.ship.stage import is_left
from blktrack.ship.target import Target
from blktrack.units import KIB, MIB
from tests import sectors
from tests.background import Running, assert_clear
from tests.blockdev import Lab, Silent, read_image, run, wait_until, write_direct
from tests.oracle import fill
from tests.smallfs import full, small_fs
from tests.test_resync import Pair
from tests.test_sync import start

pytestmark = pytest.mark.needs("root", "loop", "bpf")

SIZE, ROOM = 64 * MIB, 8 * MIB


class Tight:
    """A replica device in step with its source, and little room for what is staged for it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.source, self.replica = lab, lab.loop(SIZE), lab.loop(SIZE)
        fill(self.source)
        lab.track(self.source)
        lab.sync(self.source, self.replica)
        self.folder = folder_of(Target.find(self.replica), lab.store.paths)
        record = (self.folder / "replica.json").read_bytes()
        small_fs(lab, self.folder, ROOM)
        (self.folder / "replica.json").write_bytes(record)
        self.before = read_image(self.replica)

    def change(self, start: int, length: int, number: int = 1) -> None:
        write_direct(self.source, start, sectors.make(start, length, number))

    def assert_as_it_was(self) -> None:
        assert (read_image(self.replica) == self.before).all()
        assert not is_left(self.folder)
        assert self.link["state"] == "ready"

    @property
    def link(self) -> dict[str, object]:
        (found,) = self.lab.status(self.source)["links"]
        return dict(found)

    def assert_in_step(self) -> None:
        assert not sectors.faults(read_image(self.source), read_image(self.replica))
        assert (self.link["state"], self.link["pending_bytes"]) == ("ready", 0)


@pytest.fixture
def tight(shared: Lab) -> Tight:
    return Tight(shared)


def test_what_cannot_fit_is_not_begun(tight: Tight) -> None:
    tight.change(MIB, 16 * MIB)
    begun = {"BLKTRACK_CRASH": "stage-created"}
    done = tight.lab.blktrack("sync", tight.source, tight.replica, env=begun)
    says = (f"no room in {tight.folder} for an increment of 16 MiB", "of it is data", "--in-place")
    assert_clear(done, 1, *says)
    tight.assert_as_it_was()
    done = tight.lab.blktrack("sync", tight.source, tight.replica, "--in-place", "--json")
    assert (done.json["mode"], done.json["bytes_shipped"]) == ("incremental", 16 * MIB)
    assert done.json["consistency"] == "crash"
    tight.assert_in_step()


def test_what_may_fit_is_not_refused(tight: Tight) -> None:
    """More changed than there is room, but most of it reads as zero."""
    run("blkdiscard", "-o", str(20 * MIB), "-l", str(40 * MIB), tight.source)
    tight.change(MIB, ROOM - 256 * KIB)
    report = tight.lab.sync(tight.source, tight.replica)
    assert report.mode == "incremental"
    assert report.bytes_changed > 40 * MIB
    tight.assert_in_step()


def test_room_that_others_take_meanwhile(tight: Tight) -> None:
    tight.change(MIB, 6 * MIB)

    class Filler(Silent):
        """Takes all the room once something is staged."""

        def __init__(self) -> None:
            super().__init__()
            self.held = contextlib.ExitStack()

        def done(self, count: int) -> None:
            with contextlib.suppress(FileExistsError):
                (tight.folder / "taken").mkdir()
                self.held.enter_context(full(tight.folder))

    filler = Filler()
    with filler.held, pytest.raises(NoRoom, match="6 MiB: No space left on device") as caught:
        options = Options(limit=Rates(2 * MIB))
        sync.sync(tight.lab.store, tight.source, tight.replica, options, filler)
    assert "--in-place" in caught.value.hint and caught.value.exit_code == 1
    assert str(tight.folder) in str(caught.value)
    tight.assert_as_it_was()
    assert tight.lab.sync(tight.source, tight.replica).mode == "incremental"
    tight.assert_in_step()


def test_an_interrupted_count(tight: Tight) -> None:
    tight.change(MIB, 16 * MIB)
    running = Running(tight.lab, "sync", tight.source, tight.replica, "--limit", "1M")
    running.until_open(tight.source)
    running.process.send_signal(signal.SIGINT)
    assert_clear(running.end(), 130, "interrupted", "the replica is at its point; run it again")
    tight.assert_as_it_was()


# In place


class Halfway(Pair):
    """With changes that take some time to ship."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.more(1)

    def more(self, number: int) -> None:
        for place in range(24):
            offset = place * MIB
            write_direct(self.source, offset, sectors.make(offset, 512 * KIB, number))

    @contextlib.contextmanager
    def begun(self, *words: str) -> Iterator[None]:
        """A sync in place that has written some of it; it is killed in the end."""
        before = read_image(self.file)
        running = start(self.lab, "sync", self.source, self.file, "--limit", "3M", *words)
        try:
            wait_until(lambda: bool((read_image(self.file) != before).any()), "some of it")
            self.running = running
            yield
        finally:
            running.kill()
            running.communicate()

    @property
    def link(self) -> dict[str, object]:
        links = self.lab.status(self.source)["links"]
        return next(dict(link) for link in links if link["target"] == str(self.file))

    def assert_unfinished(self) -> None:
        record = Record.read(Path(f"{self.file}.blktrack/replica.json"))
        assert record is not None
        assert (record.state, record.next) == (State.APPLYING, None)
        link = self.link
        assert (link["state"], link["point"], link["consistency"]) == ("unfinished", None, None)
        assert "half in it" in str(link["reason"])
        with pytest.raises(BlktrackError, match="has not ended"):
            finish(str(self.file), self.lab.store.paths)

    def ends(self, mode: str) -> None:
        report = self.lab.sync(self.source, self.file)
        assert not sectors.faults(read_image(self.source), read_image(self.file))
        assert report.mode == mode, report.reason
        assert self.link["state"] == "ready"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_goes_on_after_an_end_in_the_middle(shared: Lab, number: signal.Signals) -> None:
    pair = Halfway(shared)
    with pair.begun("--in-place"):
        pair.running.send_signal(number)
        _, err = pair.running.communicate(timeout=60)
    assert pair.running.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert "the replica is unfinished; run it again" in err
    pair.assert_unfinished()
    assert pair.link["pending_bytes"] == 12 * MIB, "all of it stays pending"
    pair.change(MIB, 7)
    pair.change(30 * MIB, 8)
    # Without being asked again: from half-way there is nothing to stage from.
    done = shared.blktrack("sync", pair.source, pair.file, "--no-resync", "--json")
    assert (done.json["mode"], done.json["bytes_shipped"]) == ("incremental", 12 * MIB + 4 * KIB)
    pair.change(2 * MIB, 9)
    pair.ends("incremental")


def test_a_replica_that_went_back_from_the_middle(shared: Lab) -> None:
    """It is at the very point of its link, and nothing that it lacks has been forgotten."""
    pair = Halfway(shared)
    pair.keep()
    with pair.begun("--in-place"):
        pair.running.send_signal(signal.SIGINT)
        pair.running.communicate(timeout=60)
    pair.restore()
    assert pair.link["state"] == "ready"
    pair.ends("incremental")


@pytest.mark.parametrize("again", [False, True])
def test_a_replica_that_went_back_to_the_middle(shared: Lab, again: bool) -> None:
    """Half-way from a point that its link has left since, in one way or `again` half-way too."""
    pair = Halfway(shared)
    with pair.begun("--in-place"):
        pair.running.kill()
        pair.running.communicate()
    pair.keep()
    shared.sync(pair.source, pair.file)
    if again:
        for place in range(24):
            pair.change(place * MIB + 768 * KIB, 3)
            write_direct(pair.source, place * MIB + 800 * KIB, bytes(128 * KIB))
        with pair.begun("--in-place"):
            pair.running.kill()
            pair.running.communicate()
        pair.assert_unfinished()
    pair.restore()
    pair.ends("resync")


def test_a_copy_begun_over_it(shared: Lab) -> None:
    """A full copy that is interrupted as well forgets what it has shipped."""
    pair = Halfway(shared)
    with pair.begun("--in-place"):
        pair.running.kill()
        pair.running.communicate()
    pair.keep()
    with pair.begun("--full"):
        pair.running.send_signal(signal.SIGINT)
        pair.running.communicate(timeout=60)
    pair.restore()
    pair.ends("initial")


def test_no_point_in_place(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Halfway(shared)
    with monkeypatch.context() as patch:
        patch.setattr(Source, "is_valid", lambda *_: False)
        patch.setattr(capture, "_MOST", 1)
        options = Options(in_place=True)
        with pytest.raises(NoPoint) as caught:
            sync.sync(shared.store, pair.source, str(pair.file), options, Silent())
    assert "written in place, is at no point" in caught.value.hint
    pair.assert_unfinished()
    pair.ends("incremental")
