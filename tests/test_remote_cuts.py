"""Connections to a replica elsewhere that are lost at random moments, in every way they can be.

Whatever happened, the replica is at its old point or at the new one; the next sync goes on with
what the far side held durably, without a resync, and sends nothing of that again.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blktrack import replication, sync
from blktrack.config import Paths
from blktrack.errors import BlktrackError
from blktrack.extent import ExtentArray
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.ship.apply import finish
from blktrack.ship.partial import JOURNAL
from blktrack.ship.record import Record
from blktrack.state import LinkState
from blktrack.tracker import tracker
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold, open_tracking
from blktrack.units import KIB, MIB
from tests.blockdev import Lab, Silent, read_image, run, told, wait_until, write_direct
from tests.chains import CHAIN, judge
from tests.farside import KEEPER
from tests.lane import Shape
from tests.link import Link
from tests.netlab import NetLab
from tests.sectors import Image
from tests.test_points import CHAINS, Swaps, copy, swaps, writers

__all__ = ["swaps"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop", "bpf", "netns", "sshd")

GRANULE = 4 * KIB
SIZE = 16 * MIB
RATE = 8e6  # bytes per second
PATIENCE = 2.0  # seconds of silence
OVERHEAD = 96 * KIB  # bytes of a connection that are not data: ssh's and the protocol's
IN_FLIGHT = 5 * MIB  # bytes: the window of ssh, what waits in sockets, what threads have in hand
WAYS = (
    "the connection is reset",
    "the answers are lost",
    "the far host falls silent",
    "connections are refused",
    "sshd is killed",
    "the keeper is killed",
    "the cable is pulled",
    "the far disk is full",
    "the far host is unreachable",
)
CUTS = 54
POINTS = 5


@dataclass
class Elsewhere:
    """A source and its replica behind a link that a test breaks."""

    lab: Lab
    net: NetLab
    link: Link
    folder: Path  # of the replica
    device: str
    errors: list[str] = field(default_factory=list)

    @property
    def replica(self) -> Path:
        return self.folder / "replica"

    @property
    def target(self) -> str:
        return self.net.url(self.replica, self.link)

    def sync(self, *, retry_for: float = 0.0) -> SyncReport:
        chosen = Options(patience=PATIENCE, retry_for=retry_for, compress="none")
        return sync.sync(self.lab.store, self.device, self.target, chosen, Silent())[0]

    def known(self) -> LinkState:
        state, _ = tracker.find(self.lab.store, self.device)
        return next(link for link in self.lab.store.links(state.id) if link.target == self.target)

    def held(self) -> set[int]:
        """Granules that the far side has said to hold as they are now, and still does."""
        if not self.has_stage():
            return set()  # it was dropped, as the disk there was full
        state, device = tracker.find(self.lab.store, self.device)
        with (
            hold(self.lab.store, state.id, self.device),
            open_tracking(self.lab.store, state, device) as tracking,
            LinkSets(tracking, self.known()) as sets,
        ):
            tracking.drain()
            sets.take()
            return granules(sets.held_extents()) - granules(sets.extents())

    def has_stage(self) -> bool:
        return Path(f"{self.replica}.blktrack/{JOURNAL}").exists()

    def settle(self) -> None:
        """The keeper is gone, and the replica is at a point: at once, or for whoever asks next."""
        wait_until(lambda: not self.net.sshd.commands(), "the end of the keeper", 20)
        record = finish(str(self.replica), Paths.from_environment())
        assert record is not None and record.state == "ready" and record.point is not None
        assert Record.read(Path(f"{self.replica}.blktrack/replica.json")) == record


def granules(extents: ExtentArray) -> set[int]:
    found: set[int] = set()
    for start, length in extents.tolist():
        found.update(range(start // GRANULE, (start + length) // GRANULE))
    return found


@pytest.fixture
def elsewhere(
    shared: Lab, net: NetLab, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Elsewhere]]:
    """Makes one, with a device of so many bytes and a replica on a file system of its own."""
    with contextlib.ExitStack() as stack:

        def make(size: int) -> Elsewhere:
            folder = shared.name("far")
            folder.mkdir()
            run("mount", "-t", "tmpfs", "-o", f"size={5 * size},mode=755", "far", folder)
            stack.callback(run, "umount", folder)
            net.sshd.allow([*KEEPER, "--restrict", folder])
            monkeypatch.setenv("BLKTRACK_SSH", net.environment["BLKTRACK_SSH"])
            made = Elsewhere(shared, net, net.link(), folder, shared.loop(size))
            shared.track(made.device)
            return made

        yield make


class Strike:
    """One way to lose a connection, at a moment that chance chooses."""

    def __init__(self, at: Elsewhere, way: str, dice: random.Random, most: int, down: int) -> None:
        """most, down -- bytes that a whole sync sends, and gets back."""
        self.at, self.way = at, way
        self._after = dice.randrange(2 * KIB, 9 * most // 8 + 8 * KIB)
        self._down = dice.randrange(KIB, 9 * down // 8 + KIB)
        self._ended = threading.Event()
        self._undo: Callable[[], object] = lambda: None

    def __enter__(self) -> None:
        at, net = self.at, self.at.net
        match WAYS.index(self.way):
            case 0:
                at.link.trap("up", self._after, "cut")
            case 1:
                at.link.trap("down", self._down, "cut")
            case 2:
                at.link.trap("up", self._after, "freeze")
                self._undo = at.link.resume
            case 3:
                at.link.trap("up", self._after, "refuse")
                self._undo = at.link.accept
            case 4:
                self._later(net.sshd.kill, net.sshd.start)
            case 5:
                self._later(net.sshd.kill_commands)
            case 6:
                self._later(net.link_down, net.link_up)
            case 7:
                filler, info = at.folder / "filler", os.statvfs(at.folder)
                rest = max(info.f_bavail * info.f_frsize - self._after, 1)
                run("fallocate", "-l", str(rest), filler)
                self._undo = filler.unlink
            case 8:
                net.unreachable()
                self._undo = net.reachable

    def _later(
        self, strike: Callable[[], object], undo: Callable[[], object] = lambda: None
    ) -> None:
        begun = self.at.link.counts().up.passed

        def watch() -> None:
            while not self._ended.wait(0.002):
                if self.at.link.counts().up.passed - begun >= self._after:
                    strike()
                    self._undo = undo
                    return

        self._thread = threading.Thread(target=watch)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if hasattr(self, "_thread"):
            self._thread.join()
        self._undo()
        # A trap that was not sprung is not for the next one.
        self.at.link.trap("up", 1 << 60, "cut")
        self.at.link.trap("down", 1 << 60, "cut")


def change(at: Elsewhere, dice: random.Random) -> set[int]:
    """Overwrite some places with what does not compress; their granules."""
    found: set[int] = set()
    for _ in range(dice.randint(3, 60)):
        count = dice.choice((1, 1, 1, 2, 16, 64))
        first = dice.randrange(0, SIZE // GRANULE - count)
        write_direct(at.device, first * GRANULE, dice.randbytes(count * GRANULE))
        found.update(range(first, first + count))
    return found


def test_connections_are_lost_at_random_moments(
    elsewhere: Callable[[int], Elsewhere], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    dice = random.Random(seed)
    monkeypatch.setattr(replication, "_IN_FLIGHT", 64 * KIB)
    at = elsewhere(SIZE)
    write_direct(at.device, 0, dice.randbytes(SIZE))
    assert at.sync().mode == "initial"
    at.link.shape(Shape(rate=RATE))
    lost = resumed = reached = 0
    down = 8 * KIB
    old: Image = read_image(at.device)
    need: set[int] = set()
    held: set[int] = set()
    for number in range(CUTS):
        need |= (fresh := change(at, dice))
        held -= fresh
        new = read_image(at.device)
        to_send = len(fresh | (need - held)) * GRANULE
        before = at.link.counts()
        way = WAYS[number % len(WAYS)]
        if way == "the far disk is full":  # what is held may have to go to make room for the whole
            to_send = len(need) * GRANULE
        error: BlktrackError | None = None
        with Strike(at, way, dice, to_send, down):
            try:
                report = at.sync()
                assert report.mode in ("incremental", "nothing"), report
                down = at.link.counts().down.taken - before.down.taken
            except BlktrackError as failed:
                error = failed
            sent = at.link.counts().up.taken - before.up.taken
            assert sent <= 1.05 * to_send + OVERHEAD, (number, way, sent, to_send, len(need), error)
        at.settle()
        now = read_image(at.replica)
        at_new = (now == new).all()
        assert at_new or (now == old).all(), f"after {way} the replica is at no point: {error}"
        if error is None:
            assert at_new
        else:
            lost += 1
            resumed += bool(held)
        before_cut, held = held, at.held()
        is_known = way != "the cable is pulled"  # what left the link may wait in sockets behind it
        if error is not None and not at_new and at.has_stage() and is_known:
            arrived = at.link.counts().up.passed - before.up.passed
            again = arrived - len(held - before_cut) * GRANULE
            assert again < IN_FLIGHT, (way, again, arrived, error)
        if at_new:
            reached += 1
            old, need = new, set()
    report = at.sync()
    assert report.mode in ("incremental", "nothing")
    at.settle()
    assert (read_image(at.replica) == read_image(at.device)).all()
    told(
        f"{lost} of {CUTS} connections to a replica elsewhere lost, {resumed} of them after a"
        f" stage was gone on with, {reached} points reached"
    )
    assert lost >= 40 and reached


@pytest.mark.soak
def test_points_over_a_link_that_breaks_are_in_order(
    shared: Lab,
    net: NetLab,
    swaps: Swaps,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """A sync under writers goes on over several connections: what an earlier one staged and what
    changed since are one state of the source."""
    dice = random.Random(seed)
    monkeypatch.setattr(replication, "_IN_FLIGHT", 64 * KIB)
    folder, kept = shared.name("far"), shared.name("kept")
    folder.mkdir(mode=0o755)
    net.sshd.allow([*KEEPER, "--restrict", folder])
    monkeypatch.setenv("BLKTRACK_SSH", net.environment["BLKTRACK_SSH"])
    at = Elsewhere(shared, net, net.link(), folder, shared.loop(CHAINS * CHAIN))
    shared.track(at.device)
    at.sync()
    at.link.shape(Shape(rate=RATE))  # acknowledgements keep up
    stop, cuts = threading.Event(), 0

    def cutter() -> None:
        nonlocal cuts
        while not stop.is_set():
            at.link.trap(
                "up", dice.randrange(8 * KIB, 800 * KIB), dice.choice(("cut", "cut", "freeze"))
            )
            before = at.link.counts().sprung
            while at.link.counts().sprung == before and not stop.wait(0.01):
                pass
            cuts += at.link.counts().sprung - before
            stop.wait(dice.random() * PATIENCE)
            at.link.resume()

    with writers(at.device, shared.name("log"), 300.0) as log:
        thread = threading.Thread(target=cutter)
        thread.start()
        try:
            for _ in range(POINTS):
                report = at.sync(retry_for=600.0)
                assert report.mode == "incremental", report
                copy(at.replica, kept)
                end, image = swaps.end_of(report.point), read_image(kept)
                for chain in range(CHAINS):
                    least = log.completed_before(chain, report.point)
                    verdict = judge(image, chain, least, log.begun_by(chain, end))
                    assert not verdict.fault, f"epoch {report.epoch}: {verdict.fault}"
        finally:
            stop.set()
            thread.join()
    assert at.sync(retry_for=60.0).mode in ("incremental", "nothing")
    assert (read_image(at.replica) == read_image(at.device)).all()
    told(f"{POINTS} points of a source under writers, over a link that was lost {cuts} times")
    assert cuts > POINTS // 2
