"""Commands of blktrack killed while a device is written, and what has to hold afterwards.

A situation is a method of Campaign: it gets a device ready, has a command struck, and brings back
what the user would bring back (tracking after an untrack, say). A strike runs one command that
dies, at a crash point (blktrack/crash.py) or at some time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from blktrack import send
from blktrack.config import Paths
from blktrack.options import Options
from blktrack.ship.receive import receive
from blktrack.ship.tell import replica_status
from blktrack.sysfs import BlockDevice
from blktrack.tracker import service, tracker
from blktrack.units import KIB, MIB, SECTOR
from tests import sectors
from tests.blockdev import TOP, Lab, Silent, flush, read_image, resize, write_direct
from tests.crash_points import crash_points
from tests.oracle import fill
from tests.workload import RawMix, next_sequence

SIZE = 8 * MIB
LARGEST = 3 * SIZE  # to which it may grow
LINK = "far"
UNTRACKED, REPAIR = "it was untracked", "repair was asked for"

# Points that a command comes to only if it is lucky: here, if a round was not valid.
BY_CHANCE = {"more-added"}
# What no replica of this host needs: a stage that is made to be kept, a keeper, and what is noted
# of a replica elsewhere. See test_partial_death.py, test_keeper.py and test_remote_status.py.
ELSEWHERE = ("part-", "serve-", "away-")
# Those of a stage that outlives its round: see test_held.py.
HELD = {"held-added", "held-cleared", "held-returned", "stage-recorded"}

Strike = Callable[..., None]  # of a command, given by its words
Situation = Callable[["Campaign", Strike], None]


@functools.cache
def points() -> tuple[str, ...]:
    """The names of all crash points that commands come to."""
    names = all_points()
    assert set(names) >= BY_CHANCE | HELD
    left = BY_CHANCE | HELD
    return tuple(name for name in names if name not in left and not name.startswith(ELSEWHERE))


@functools.cache
def all_points() -> tuple[str, ...]:
    """The names of all crash points, from the sources."""
    return crash_points(TOP / "blktrack")


class Writers:
    """Two threads that change a device, each with a mix of its own, until they are stopped."""

    def __init__(self, path: str, seed: int) -> None:
        self._path, self._seeds = path, itertools.count(seed)
        self._threads: list[threading.Thread] = []
        self._errors: list[Exception] = []
        self._end = threading.Event()

    def start(self) -> None:
        self._end.clear()
        mixes = [RawMix(self._path, next(self._seeds)) for _ in range(2)]
        self._threads = [threading.Thread(target=self._write, args=[mix]) for mix in mixes]
        for thread in self._threads:
            thread.start()

    def _write(self, mix: RawMix) -> None:
        try:
            while not self._end.is_set():
                mix.run(4)
        except Exception as error:
            self._errors.append(error)

    def stop(self) -> None:
        """Leaves all they did on the device."""
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._errors:
            raise self._errors[0]
        flush(self._path)


class Campaign:
    """A tracked device with a replica file and a replica device, to be replicated whatever dies."""

    def __init__(
        self, lab: Lab, kind: str, seed: int, *, commands: Path = TOP, writing: bool = True
    ) -> None:
        """commands -- the folder whose blktrack is killed; what follows is done by this one."""
        self.lab, self.random, self.commands = lab, random.Random(seed), commands
        self.file = lab.name("disk")
        self.device = lab.zram(SIZE) if kind == "zram" else lab.loop(SIZE, file=self.file)
        self._can_grow = kind != "zram"
        self.targets = [str(lab.name("replica")), lab.loop(LARGEST)]
        self.writing = writing
        self.writers = Writers(self.device, seed)
        self.hits: Counter[str] = Counter()
        self.rounds = self.deaths = 0
        self._struck = self.targets[0]  # what the last command was about
        self._asked: set[str] = set()  # targets that may be copied or compared as a whole
        self._doubts = 0  # so many may there be: one for each untrack
        fill(self.device)
        tracker.track(lab.store, self.device, None)
        self._past = len(lab.status(self.device)["doubts"])  # of another device of its name
        self.far, self.there = lab.name("far"), Paths.below(lab.name("there"))
        self._asked.update([*self.targets, LINK])
        self._sync(*self.targets)
        self._carry()
        self.seconds = self.duration("sync", self.device, self.targets[0])

    def duration(self, *words: str) -> float:
        begun = time.monotonic()
        assert self.lab.blktrack(*words, top=self.commands).code == 0
        return time.monotonic() - begun

    # Strikes.

    def at(self, point: str, turn: int = 1) -> Strike:
        """Death where a point is reached for the `turn`-th time, if it is."""

        def strike(*words: str) -> None:
            named = {"BLKTRACK_CRASH": f"{point}:{turn}" if turn > 1 else point}
            done = self.lab.blktrack(*words, env=named, top=self.commands)
            if done.code == -signal.SIGKILL:
                assert not done.err, done.err
                self.hits[point] += 1
                self.deaths += 1
            else:
                # 4: under these writes there was no point to be had.
                assert done.code in (0, 4), f"{words}: {done.code}, {done.err}"

        return strike

    def at_some_time(self, *words: str) -> None:
        """Death at a random instant, mostly after Python has started."""
        command = [sys.executable, "-m", "blktrack", *words]
        seconds = self.seconds * self.random.uniform(0.3, 1.3)
        with subprocess.Popen(
            command,
            cwd=self.commands,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            try:
                _, errors = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            self.deaths += 1
        else:
            assert process.returncode in (0, 4), f"{words}: {process.returncode}, {errors}"
        assert "Traceback" not in errors, errors

    # Situations.

    def incremental(self, strike: Strike) -> None:
        strike("sync", self.device, self._target())

    def in_place(self, strike: Strike) -> None:
        strike("sync", self.device, self._target(), "--in-place")

    def twice(self, strike: Strike) -> None:
        """The sync that finishes what a dead one began dies as well."""
        target = self._target()
        firsts = [point for point in points() if point.startswith(("drain-", "commit-", "ship-"))]
        self.at(self.random.choice(firsts))("sync", self.device, target)
        self._write()
        strike("sync", self.device, target)

    def ahead(self, strike: Strike) -> None:
        """The sync dies that finds its replica ahead of the link."""
        target = self._target()
        in_place = ["--in-place"] if self.random.random() < 0.5 else []
        self.at("commit-replica")("sync", self.device, target, *in_place)
        self._write()
        strike("sync", self.device, target)

    def taken(self, strike: Strike) -> None:
        """What has been taken by a dead sync is added to."""
        target = self._target()
        self.at(self.random.choice(["take-done", "ship-planned"]))("sync", self.device, target)
        self._write()
        strike("sync", self.device, target)

    def full(self, strike: Strike) -> None:
        strike("sync", self.device, self._target(asked=True), "--full")

    def resumed(self, strike: Strike) -> None:
        """A full copy dies, and what was begun goes on in the next sync."""
        target = self._target(asked=True)
        self.at("ship-begun")("sync", self.device, target, "--full")
        strike("sync", self.device, target, "--full")

    def repair(self, strike: Strike) -> None:
        strike("verify", self.device, self._target(asked=True), "--repair")

    def initial(self, strike: Strike) -> None:
        """To a file that is not there yet, or empty."""
        file = self.lab.name("replica")
        if self.random.random() < 0.5:
            file.touch()
        self._first(file, strike)

    def initial_to_empty(self, strike: Strike) -> None:
        file = self.lab.name("replica")
        file.touch()
        self._first(file, strike)

    def _first(self, file: Path, strike: Strike) -> None:
        self._struck = str(file)
        self.targets[2:] = [self._struck]  # instead of the one made before
        self._asked.add(str(file))
        strike("sync", self.device, str(file))

    def streamed(self, strike: Strike) -> None:
        """A stream that nobody takes."""
        strike("send", self.device, "--link", LINK)

    def committed(self, strike: Strike) -> None:
        """What was received is committed, perhaps after a later stream has died."""
        epoch = self._receive()
        if self.random.random() < 0.5:
            self._write()
            place = self.random.choice(["take-done", "send-begun", "send-recorded"])
            self.at(place)("send", self.device, "--link", LINK)
        strike("send", self.device, "--link", LINK, "--commit", str(epoch))

    def look(self, strike: Strike) -> None:
        command = self.random.choice(["status", "extents", "track"])
        strike(command, self.device)

    def untrack(self, strike: Strike) -> None:
        self.expect_untracked()
        strike("untrack", self.device)
        tracker.track(self.lab.store, self.device, None)

    def track(self, strike: Strike) -> None:
        self.expect_untracked()
        tracker.untrack(self.lab.store, self.device)
        strike("track", self.device)
        tracker.track(self.lab.store, self.device, None)

    def anew(self, strike: Strike) -> None:
        """A sync that finds the generation ended begins another."""
        self.expect_untracked()
        self.at("end-recorded")("untrack", self.device)
        strike("sync", self.device, self._target())

    def stop(self, strike: Strike) -> None:
        with self._quiet():
            strike("stop", self.device)

    def start(self, strike: Strike) -> None:
        with self._quiet():
            (done,) = service.stop(self.lab.store, self.device)
            assert done.action == "stopped", done
            strike(self.random.choice(["start", "extents", "track"]), self.device)

    def grow(self, strike: Strike) -> None:
        """The device is larger when the command comes, and changed beyond its old end."""
        self._struck = self.targets[0]
        size = BlockDevice.find(self.device).size
        grown = size + self.random.randrange(1, 2 * MIB // SECTOR) * SECTOR
        if grown > LARGEST:
            grown = size + SECTOR
        resize(self.device, self.file, grown)
        write_direct(self.device, grown - SECTOR, self._sectors(grown - SECTOR, SECTOR))
        strike("sync", self.device, self._struck)

    # Rounds.

    def chosen(self, situations: Iterable[Situation]) -> list[Situation]:
        """Those that this device can get into, in random order."""
        able = [one for one in situations if one is not Campaign.grow or self._can_grow]
        return self.random.sample(able, len(able))

    def round(self, situation: Situation, strike: Strike) -> None:
        """A strike while the device is written; then all has to be as if nothing had happened."""
        self.rounds += 1
        if self.writing:
            self.writers.start()
        try:
            self._write()
            situation(self, strike)
            self._write()
            # Otherwise all that is left to do is left to the sync of the quiet device.
            if self.writing and self.random.random() < 0.5:
                self._sync(self._struck)
        finally:
            if self.writing:
                self.writers.stop()
        self._sync(*self.targets)
        self._carry()
        self._compare()

    def _sync(self, *targets: str) -> None:
        """Each succeeds, and none copies or compares everything unless that was asked for."""
        for target in targets:
            done = self.lab.sync(self.device, target)
            if target not in self._asked:
                told = f"{done.mode} of {target}: {done.reason}"
                assert done.mode in ("incremental", "nothing"), told
            self._asked.discard(target)

    def _carry(self) -> None:
        """A stream of the quiet device to the far replica, which may be ahead of its link."""
        store, found = self.lab.store, replica_status(str(self.far), self.there)
        if found is not None and found.epoch is not None:
            send.commit(store, self.device, LINK, found.epoch)
        send.commit(store, self.device, LINK, self._receive())

    def _receive(self) -> int:
        """Bring the far replica on by a stream that nothing interrupts; its epoch."""
        file, options = io.BytesIO(), Options(consistency="none")
        store, observer = self.lab.store, Silent()
        done = send.send(store, self.device, LINK, file, options=options, observer=observer)
        if LINK not in self._asked:
            assert done.mode in ("incremental", "nothing"), f"{done.mode}: {done.reason}"
        self._asked.discard(LINK)
        file.seek(0)
        return receive(file, str(self.far), self.there).epoch

    def _compare(self) -> None:
        """Of the quiet device and its replicas, every byte; and nothing was ever in doubt."""
        image = read_image(self.device)
        for target in (*self.targets, str(self.far)):
            replica = read_image(target)[: len(image)]
            found = sectors.faults(image, replica)
            assert not found, f"{target}\n{sectors.describe(found)}"
        status = self.lab.status(self.device)
        assert status["state"] == "tracking", status["reason"]
        doubts = [doubt["reason"] for doubt in reversed(status["doubts"])][self._past :]
        assert set(doubts) <= {UNTRACKED}, doubts
        assert len(doubts) <= self._doubts, doubts
        # Those of the commands that were struck and lived count as well.
        for link in status["links"]:
            if link["target"] in self.targets or link["name"] == LINK:
                resyncs = [resync["reason"] for resync in link["resyncs"]]
                assert set(resyncs) <= {UNTRACKED, REPAIR}, resyncs

    # What situations are made of.

    def _target(self, *, asked: bool = False) -> str:
        self._struck = self.random.choice(self.targets)
        if asked:
            self._asked.add(self._struck)
        return self._struck

    def expect_untracked(self) -> None:
        self._doubts += 1
        self._asked.update([*self.targets, LINK])

    def _sectors(self, offset: int, length: int) -> sectors.Image:
        return sectors.make(offset, length, next_sequence())

    def _write(self) -> None:
        """A few changes that have ended when the command comes."""
        for _ in range(3):
            offset = self.random.randrange(SIZE // (4 * KIB)) * 4 * KIB
            write_direct(self.device, offset, self._sectors(offset, 4 * KIB))

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Nobody uses the device meanwhile; afterwards it is tracked."""
        if self.writing:
            self.writers.stop()
        try:
            yield
            (done,) = service.start(self.lab.store, self.device)
            assert done.action in ("resumed", "tracking"), done
        finally:
            if self.writing:
                self.writers.start()


SYNCS: tuple[Situation, ...] = (
    Campaign.incremental,
    Campaign.in_place,
    Campaign.twice,
    Campaign.ahead,
    Campaign.full,
    Campaign.repair,
    Campaign.initial,
)
OTHERS: tuple[Situation, ...] = (
    Campaign.streamed,
    Campaign.committed,
    Campaign.look,
    Campaign.taken,
    Campaign.resumed,
    Campaign.track,
    Campaign.untrack,
    Campaign.anew,
    Campaign.stop,
    Campaign.start,
    Campaign.grow,
)

# Which situations come to a point, by the beginning of its name; syncs come to all others.
REACHED: dict[str, tuple[Situation, ...]] = {
    "apply-resized": (Campaign.initial_to_empty, Campaign.grow),
    "begin-": (Campaign.track, Campaign.anew),
    "begin-attached": (Campaign.track, Campaign.anew, Campaign.start),
    "begin-removed": (Campaign.track, Campaign.anew, Campaign.start),
    "catch-up-": (Campaign.ahead,),
    "drain-": (*SYNCS, Campaign.stop, Campaign.grow),
    "end-": (Campaign.untrack,),
    "file-": (*SYNCS, Campaign.track, Campaign.untrack, Campaign.stop, Campaign.start),
    "fill-": (Campaign.full, Campaign.repair, Campaign.initial),
    "grow-": (Campaign.grow,),
    "send-": (Campaign.streamed,),
    "send-committed": (Campaign.committed,),
    "start-": (Campaign.start,),
    "stop-": (Campaign.stop,),
    "take-": (Campaign.incremental, Campaign.twice, Campaign.taken, Campaign.resumed),
    "take-added": (Campaign.taken,),
}


def reaching(point: str) -> tuple[Situation, ...]:
    """The situations that come to a crash point."""
    names = [name for name in REACHED if point.startswith(name)]
    return REACHED[max(names, key=len)] if names else SYNCS
