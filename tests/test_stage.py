"""Staged increments: a replica is at the old point or at the new one, whatever dies when."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blktrack import extent, linux
from blktrack.errors import BlktrackError, Busy, CopyFailed, Refused
from blktrack.extent import ExtentArray, from_pairs
from blktrack.ship.apply import ApplyStopped, finish
from blktrack.ship.copy import Copied, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.header import Header, StageDamaged
from blktrack.ship.pack import ZERO
from blktrack.ship.place import inspect
from blktrack.ship.record import Record, State
from blktrack.ship.replica import Replica
from blktrack.ship.stage import Stage, is_left
from blktrack.sysfs import BlockDevice
from blktrack.units import KIB, MIB
from tests.blockdev import flush, told
from tests.copies import content, image, patched, random_extents, whole
from tests.crash_points import crash_points
from tests.loopdev import Disks, disks_in_memory
from tests.stager import LINK, TOP, Order, Stager, bring, open_replica, point

pytestmark = pytest.mark.needs("root", "loop")

SIZE = 8 * MIB


class Lab:
    """A source, a replica of it at a point, and increments between them."""

    def __init__(self, disks: Disks, kind: str, seed: int, size: int = SIZE) -> None:
        self.disks, self.kind, self.size = disks, kind, size
        self.rng = np.random.default_rng(seed)
        self.unit = 4096 if kind == "4k" else 512
        self.source = disks.loop(size, sector=self.unit)
        self.decoy = disks.name("decoy")
        self.decoy.write_bytes(image(self.rng, size, 0.1))
        self.home = disks.folder
        match kind:
            case "ext4":
                self.home = disks.mount(disks.loop(4 * size + 16 * MIB), "ext4")
            case "xfs":
                self.home = disks.mount(disks.loop(512 * MIB), "xfs")
        on_device = kind in ("512", "4k")
        self.target = disks.loop(size, sector=self.unit) if on_device else self.home / "replica"
        self.order = Order(
            "apply", str(disks.folder), str(self.target), str(self.source), str(self.decoy), [], 0
        )
        self.put(image(self.rng, size))
        with self.open() as replica, open_end(str(self.source)) as source:
            replica.begin(State.UNFINISHED, point(0).generation)
            copy(source, replica.end, whole(size))
            replica.commit(point(0))
        self.old = self.replica()

    def put(self, data: bytes | bytearray) -> None:
        with open(self.source, "r+b") as file:
            file.write(data)
        flush(str(self.source))

    def open(self) -> Replica:
        return open_replica(self.order)

    def replica(self) -> bytes:
        if self.target.is_block_device():
            flush(str(self.target))
        return content(self.target)[: self.size]

    def holds(self, expected: bytes) -> bool:
        """Asked this way, a test that fails does not compare megabytes line by line."""
        return self.replica() == expected

    @property
    def folder(self) -> Path:
        if not self.target.is_block_device():
            return Path(f"{self.target}.blktrack")
        (found,) = (self.disks.folder / "lib" / "replicas").iterdir()
        return found

    def change(self, extents: ExtentArray | None = None, *, full: bool = False) -> bytes:
        """The source changes, without zeroes if `full`; what the replica is at its next point."""
        if extents is None:
            extents = random_extents(self.rng, self.size, self.unit)
        data = self.rng.bytes(self.size) if full else image(self.rng, self.size)
        new = patched(self.old, data, extents)
        self.put(new)
        self.order = dataclasses.replace(
            self.order, extents=extents.tolist(), epoch=self.order.epoch + 1
        )
        return new

    def resize(self, size: int) -> None:
        """The source has another size, and the end of what it grew by is zero."""
        self.source = self.disks.loop(size)
        self.order.source = str(self.source)
        os.truncate(self.decoy, size)
        # The source is known again by its path alone.
        record = Record.read(self.folder / "replica.json")
        assert record is not None
        same = dataclasses.replace(record.source, device=str(self.source), name="")
        dataclasses.replace(record, source=same).write(self.folder / "replica.json")
        self.old = self.old[:size] + bytes(max(size - len(self.old), 0))
        self.size = size

    @property
    def extents(self) -> ExtentArray:
        return from_pairs([(start, length) for start, length in self.order.extents])

    @contextlib.contextmanager
    def staged(self, replica: Replica) -> Iterator[Stage]:
        """A sealed stage of the last change."""
        with replica.stage() as stage, open_end(str(self.source)) as source:
            copy(source, stage.end, self.extents)
            stage.seal(self.extents, point(self.order.epoch))
            yield stage

    def seal(self) -> None:
        """Seal it and do not apply it, as by a death."""
        with self.open() as replica, self.staged(replica):
            pass

    def record(self) -> Record:
        record, change = inspect(str(self.target), self.order.paths)
        assert record is not None and not change
        return record

    def has_settled(self) -> int:
        """Open the replica as the next sync would; the epoch that it is at then."""
        with self.open() as replica:
            assert replica.changed == ""
            record = replica.record
        assert record is not None and record.state is State.READY and record.point is not None
        assert not is_left(self.folder)
        return record.point.epoch


KINDS = [
    "tmpfs",
    pytest.param("ext4", marks=pytest.mark.needs("ext4")),
    pytest.param("xfs", marks=pytest.mark.needs("xfs")),
    "512",
    "4k",
]
every_kind = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize("kind", ["tmpfs", "512"])


@every_kind
def test_increments(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    for _ in range(7):
        new = lab.change()
        bring(lab.order)
        assert lab.holds(new)
        assert not is_left(lab.folder)
        record = lab.record()
        assert (record.state, record.point, record.next) == (
            State.READY,
            point(lab.order.epoch),
            None,
        )
        lab.old = new


@some_kinds
def test_nothing_changed_but_the_point(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    lab.change(extent.empty())
    bring(lab.order)
    assert lab.holds(lab.old)
    assert lab.record().point == point(1)


def test_a_source_that_grew_and_shrank(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    for size in (SIZE + 5 * MIB, SIZE - 3 * MIB):
        lab.resize(size)
        new = lab.change(from_pairs([(size - MIB, MIB), (4096, 512)]))
        lab.seal()
        assert lab.has_settled() == lab.order.epoch
        assert lab.target.stat().st_size == size
        assert lab.holds(new)
        assert lab.record().source.size == size
        lab.old = new


@pytest.mark.needs("xfs")
def test_blocks_are_shared(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "xfs", seed)
    extents = from_pairs([(0, 3 * MIB), (4 * MIB - 512, 3 * MIB + 1024)])
    lab.change(extents)
    lab.put(new := patched(lab.old, os.urandom(SIZE), extents))
    with lab.open() as replica, lab.staged(replica) as stage:
        os.link(stage.file.path, lab.home / "kept")  # its blocks are not freed with it
        before = free(lab.home)
        replica.apply(stage)
        used = before - free(lab.home)
    assert used < MIB // 2, "6 MiB of data took no space"
    assert lab.holds(new)


def free(path: Path) -> int:
    os.sync()
    room = os.statvfs(path)
    return room.f_bfree * room.f_bsize


@pytest.mark.needs("xfs")
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL])
def test_without_reflinks_it_is_copied(
    disks: Disks, seed: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that shows after some extents."""
    lab = Lab(disks, "xfs", seed)
    share = linux.clone_range
    for allowed in (0, 1, 2):
        left = [allowed]

        def clone(*arguments: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
            share(*arguments)

        monkeypatch.setattr(linux, "clone_range", clone)
        new = lab.change(from_pairs([(512, MIB), (3 * MIB, MIB), (5 * MIB, 2 * MIB)]), full=True)
        bring(lab.order)
        assert left[0] == -1
        assert lab.holds(new)
        lab.old = new


@pytest.mark.needs("xfs")
def test_a_file_system_that_fails_to_share(
    disks: Disks, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(disks, "xfs", seed)
    new = lab.change(from_pairs([(0, MIB)]), full=True)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(linux, "clone_range", full)
        with pytest.raises(CopyFailed, match=r"share blocks in .*: No space left"):
            bring(lab.order)
    record = lab.record()
    assert (record.state, record.point, record.next) == (State.APPLYING, point(0), point(1))
    assert lab.has_settled() == 1
    assert lab.holds(new)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_zeroes_become_holes(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    lab.put(os.urandom(SIZE))
    lab.old = content(lab.source)
    lab.order = dataclasses.replace(lab.order, extents=[[0, SIZE]], epoch=1)
    bring(lab.order)
    assert lab.holds(lab.old)
    full = lab.target.stat().st_blocks
    # In one round; then in a second one that overrides data of the first.
    zero = from_pairs([(MIB, 2 * MIB), (5 * MIB + 512, 40 * KIB)])
    lab.put(new := patched(lab.old, bytes(SIZE), zero))
    lab.order = dataclasses.replace(lab.order, extents=zero.tolist(), epoch=2)
    with lab.open() as replica, replica.stage() as stage, open_end(str(lab.source)) as source:
        copy(source, stage.end, zero)
        assert (stage.end.index()[:, 2] == ZERO).all()
        with open_end(str(lab.decoy)) as decoy:
            copy(decoy, stage.end, zero)
        assert (stage.end.index()[:, 2] != ZERO).any()
        copy(source, stage.end, zero)
        stage.seal(zero, point(2))
        assert (stage.index[:, 2] == ZERO).all()
        replica.apply(stage)
    assert lab.holds(new)
    assert lab.target.stat().st_blocks <= full - 2 * MIB // 512


# Death.


POINTS = crash_points(TOP / "blktrack" / "ship")
RESIZED = "apply-resized"  # where the source has another size than before
NEVER = ("copy-flushed", "copy-checkpoint")  # of a copy that is not staged
ON_THE_WAY = [name for name in POINTS if name not in (RESIZED, *NEVER)]
FILES = [f"file-{step}:{turn}" for step in ("written", "renamed") for turn in range(1, 5)]


class Deaths:
    """Increments whose process dies, or two of them, and what is there then."""

    def __init__(self, lab: Lab, commands: Path = TOP) -> None:
        """commands -- the folder whose blktrack dies."""
        self.lab = lab
        self.stager = Stager(commands)
        lab.disks.held.callback(self.stager.close)
        self.count = 0
        self.found: Counter[str] = Counter()

    def round(self, crash: str = "", seconds: float | None = None) -> bool:
        """Whether it died. The next one begins where this one led to."""
        lab = self.lab
        new = lab.change()
        epoch = lab.order.epoch
        died = self.stager.run(lab.order, crash, seconds)
        self.count += died
        sealed = (lab.folder / "incoming.json").exists()
        record = lab.record()
        assert record.point is not None
        committed = sealed or record.point.epoch == epoch
        if record.state is State.READY:
            self._is_at(record.point.epoch, new)
            waits = sealed and record.point.epoch < epoch
            assert record.next == (point(epoch) if waits else None)
            found = "new" if record.point.epoch == epoch else "sealed" if sealed else "old"
        else:
            assert (record.state, record.next) == (State.APPLYING, point(epoch))
            found = "applying"
        self.found[found] += died
        if lab.rng.random() < 0.3:  # what finishes it dies as well
            what, place = lab.rng.choice(["finish", "open"]), lab.rng.choice([*ON_THE_WAY, *FILES])
            self.stager.run(dataclasses.replace(lab.order, what=str(what)), str(place))
        if lab.rng.random() < 0.5 and committed:
            after = finish(str(lab.target), lab.order.paths)
            assert after is not None and after.point == point(epoch)
        at = lab.has_settled()
        assert (at == epoch) == committed
        self._is_at(at, new)
        lab.old = new if committed else lab.old
        lab.order.epoch = at
        return died

    def _is_at(self, epoch: int, new: bytes) -> None:
        assert self.lab.holds(new if epoch == self.lab.order.epoch else self.lab.old)

    def __str__(self) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in sorted(self.found.items()))


def at_every_place(lab: Lab) -> None:
    deaths = Deaths(lab)
    for place in lab.rng.permutation([*ON_THE_WAY, *FILES]):
        assert deaths.round(str(place)), f"nothing came to {place}"
    for place in NEVER:
        assert not deaths.round(place), f"an increment came to {place}: it is on the way"
    told(f"stage on {lab.kind}: {deaths.count} deaths at crash points, {deaths}")


def at_any_time(lab: Lab, count: int) -> None:
    deaths = Deaths(lab)
    longest = 0.0
    for _ in range(4):  # of some changes much more is to be done than of others
        assert not deaths.round()
        longest = max(longest, deaths.stager.seconds)
    while deaths.count < count:
        deaths.round(seconds=float(lab.rng.uniform(0, longest)))
    told(f"stage on {lab.kind}: {deaths.count} deaths at random moments, {deaths}")


few = pytest.mark.parametrize(
    "kind", ["tmpfs", "512", pytest.param("xfs", marks=pytest.mark.needs("xfs"))]
)


@few
def test_death_at_every_crash_point(disks: Disks, seed: int, kind: str) -> None:
    at_every_place(Lab(disks, kind, seed))


@few
def test_death_at_random_moments(disks: Disks, seed: int, kind: str) -> None:
    at_any_time(Lab(disks, kind, seed), 34)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_death_while_a_replica_gets_another_size(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    deaths = Deaths(lab)
    for size in (SIZE + 5 * MIB, SIZE - 3 * MIB):
        lab.resize(size)
        assert deaths.round(RESIZED)
        assert lab.target.stat().st_size == size


@pytest.mark.soak
@every_kind
def test_death_for_long(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    at_every_place(lab)
    at_any_time(lab, 100)


APPLY = "ship/apply.py"
LEAVE = "    place.leave(stage.link, source, State.APPLYING, stage.base, stage.point)\n"
BRING = "    _bring(place, stage, progress, stop or threading.Event())\n"
ARRIVE = "    place.arrive(stage.link, source, stage.point)\n"
# Steps in a wrong order: file, text, text that replaces it, where it dies.
BREAKAGES = {
    "it is applied before that is on record": (
        APPLY,
        f'{LEAVE}{BRING}    crash.point("apply-copied")\n',
        f'{BRING}    crash.point("apply-copied")\n{LEAVE}',
        "apply-copied",
    ),
    "the point is on record before the bytes are": (
        APPLY,
        f'{BRING}    crash.point("apply-copied")\n{ARRIVE}',
        f'{ARRIVE}    crash.point("apply-copied")\n{BRING}',
        "apply-copied",
    ),
    "the stage is dropped before the point is on record": (
        APPLY,
        ARRIVE,
        f"    stage.drop()\n{ARRIVE}",
        "commit-flushed",
    ),
    "it is sealed before its second round": (
        "../tests/stager.py",
        "        copy(source, stage.end, every)\n        stage.seal(every, point(order.epoch))\n",
        "        stage.seal(every[::2], point(order.epoch))\n"
        "        copy(source, stage.end, every)\n",
        "stage-sealed",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_steps_in_a_wrong_order_are_found(disks: Disks, seed: int, breakage: str) -> None:
    name, old, new, place = BREAKAGES[breakage]
    broken = disks.name("broken")
    for folder in ("blktrack", "tests"):
        shutil.copytree(TOP / folder, broken / folder)
    file = broken / "blktrack" / name
    text = file.read_text()
    assert text.count(old) == 1, f"{name} no longer says {old!r} once"
    file.write_text(text.replace(old, new))
    deaths = Deaths(Lab(disks, "tmpfs", seed), broken)
    with pytest.raises(AssertionError):
        deaths.round(place)
    assert deaths.count == 1


# What does not fit.


@some_kinds
def test_a_replica_that_others_wrote_to(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    for how in ("in the same run", "by the next", "by finish"):
        lab.change()
        if how == "in the same run":
            with lab.open() as replica, lab.staged(replica) as stage:
                poke(lab.target)
                changed = lab.replica()
                with pytest.raises(Refused, match="not as it was left: it was written to"):
                    replica.apply(stage)
                assert "written to" in replica.changed
                with pytest.raises(ValueError, match="written to"):
                    replica.stage()
        else:
            lab.seal()
            poke(lab.target)
            changed = lab.replica()
            if how == "by finish":
                record = finish(str(lab.target), lab.order.paths)
                assert record is not None and record.point == point(lab.order.epoch - 1)
                assert not is_left(lab.folder)
            with lab.open() as replica:
                assert "written to" in replica.changed
                assert replica.finished is None
        assert not is_left(lab.folder)
        assert lab.holds(changed), "nothing was applied"
        lab.order.epoch -= 1
        with lab.open() as replica:  # a resync
            replica.begin(State.UNFINISHED, "generation-1")
            replica.commit(point(lab.order.epoch))


def poke(path: Path, offset: int = 3 * MIB) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(os.urandom(512))
        file.flush()
        os.fsync(file.fileno())


def test_what_may_be_staged_when(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    lab.change()
    with lab.open() as replica:
        with replica.stage() as stage:
            first = Path(stage.file.path)
            assert first.stat().st_size == 0
            for bad in ([(0, 0)], [(-512, 512)], [(SIZE - 512, 1024)], [(4096, 512), (0, 512)]):
                with pytest.raises(ValueError, match="extent"):
                    stage.seal(np.array(bad, dtype=np.int64), point(1))
            with pytest.raises(ValueError, match="not sealed"):
                replica.apply(stage)
        assert not is_left(lab.folder), "what is not sealed goes"
        with lab.staged(replica):
            pass
        assert is_left(lab.folder), "what is sealed stays"
        with replica.stage() as stage:
            assert stage.point is None
        assert not is_left(lab.folder)
        with lab.staged(replica):
            pass
        replica.begin(State.APPLYING, "generation-1")
        assert not is_left(lab.folder), "its point is left"
        with pytest.raises(ValueError, match="no point"):
            replica.stage()
        replica.begin(State.UNFINISHED, "generation-1")
        with pytest.raises(ValueError, match="no point"):
            replica.stage()


@every_kind
def test_a_stop_while_it_is_applied(disks: Disks, seed: int, kind: str) -> None:
    """Before the first block, and as often as one likes; then all of it is done."""
    lab = Lab(disks, kind, seed)
    new = lab.change(extents=from_pairs([(0, 4 * MIB), (5 * MIB, MIB)]))
    stop = threading.Event()
    stop.set()
    caught = pytest.raises(ApplyStopped, match="interrupted")
    with lab.open() as replica, lab.staged(replica) as stage, caught as error:
        replica.apply(stage, stop=stop)
    assert "the next sync finishes that first" in error.value.hint
    assert lab.holds(lab.old), "nothing was to be begun any more"
    source = BlockDevice.find(str(lab.source))
    for _ in range(2):
        record = lab.record()
        assert (record.state, record.point, record.next) == (State.APPLYING, point(0), point(1))
        with pytest.raises(ApplyStopped):
            Replica.open(
                str(lab.target), source=source, link=LINK, paths=lab.order.paths, stop=stop
            )
    stop.clear()
    with lab.open() as replica:
        assert replica.finished == point(1)
    assert lab.has_settled() == 1
    assert lab.holds(new)


@some_kinds
def test_a_stop_in_the_middle_of_it(disks: Disks, seed: int, kind: str) -> None:
    size = 64 * MIB
    lab = Lab(disks, kind, seed, size)
    new = lab.change(extents=from_pairs([(0, size)]))
    stop = threading.Event()

    def progress(count: int) -> None:
        if count:
            stop.set()

    with lab.open() as replica, lab.staged(replica) as stage, pytest.raises(ApplyStopped):
        replica.apply(stage, progress, stop)
    assert not lab.holds(lab.old) and not lab.holds(new)
    assert lab.has_settled() == 1
    assert lab.holds(new)


def test_finish_without_the_source(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    name, paths = str(lab.target), lab.order.paths
    new = lab.change()
    before = lab.target.stat()
    assert finish(name, paths) == lab.record()
    assert lab.target.stat().st_atime_ns == before.st_atime_ns, "not even opened"
    assert finish(str(lab.disks.name("none")), paths) is None
    lab.seal()
    record = lab.record()
    assert (record.state, record.point, record.next) == (State.READY, point(0), point(1))
    with open_end(name, writable=True), pytest.raises(Busy):
        finish(name, paths)
    with disks_in_memory() as other:
        device = other.loop(file=lab.target)
        with pytest.raises(Refused, match=f"attached to {device}"):
            finish(name, paths)
    assert lab.record().next == point(1)
    after = finish(name, paths)
    assert after == lab.record()
    assert (after.point, after.next) == (point(1), None)
    assert lab.holds(new)
    assert lab.has_settled() == 1


@some_kinds
def test_the_next_run_is_told(disks: Disks, seed: int, kind: str) -> None:
    lab = Lab(disks, kind, seed)
    new = lab.change()
    lab.seal()
    with lab.open() as replica:
        assert replica.finished == point(1)
        assert replica.record is not None and replica.record.point == point(1)
        assert lab.holds(new)
    with lab.open() as replica:
        assert replica.finished is None


# Damage.


SMALL = MIB


def edit(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "incoming.json"
        *above, last = name.split(".")
        everything = inner = json.loads(path.read_text())
        for key in above:
            inner = inner[key]
        inner[last] = value
        path.write_text(json.dumps(everything))

    return change


def put(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def index_of(*rows: tuple[int, int, int]) -> Callable[[Path], None]:
    """An index that nobody would seal, with its digest."""

    def change(folder: Path) -> None:
        data = np.array(rows, dtype="<i8").tobytes()
        (folder / "incoming.index").write_bytes(data)
        edit("extents", len(rows))(folder)
        sealed = Header.read(folder)
        assert sealed is not None
        edit("digest", sealed.over(data))(folder)

    return change


def truncate(folder: Path) -> None:
    os.truncate(folder / "incoming.pack", SMALL - 512)


def overwrite(folder: Path) -> None:
    poke(folder / "incoming.pack", 0)


def replace_by_a_link(folder: Path) -> None:
    (folder / "incoming.pack").rename(folder / "elsewhere")
    (folder / "incoming.pack").symlink_to("elsewhere")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


# Found by whoever reads the header, which is all that a look does.
HEADERS = {
    "an empty header": put("incoming.json", b""),
    "a header that is no object": put("incoming.json", b"[]"),
    "a deep header": put("incoming.json", b"[" * 60_000),
    "a long header": put("incoming.json", b" " * (1 << 20)),
    "a header of nothing": put("incoming.json", b"{}"),
    "a text for a size": edit("size", "x"),
    "a negative size": edit("size", -1),
    "a size beyond any": edit("size", 1 << 80),
    "true for a count": edit("extents", True),
    "a list for a link": edit("link", []),
    "no points": edit("point", None),
    "a list for a point": edit("base", [1]),
    "a point of no time": edit("point.time", float("nan")),
    "a point of another level": edit("point.consistency", "best"),
    "a level that is none": edit("point.consistency", ["none"]),
    "a generation that is none": edit("base.generation", 7),
}
DAMAGES = HEADERS | {
    "no image": without("incoming.pack"),
    "a short image": truncate,
    "an image written to": overwrite,
    "an image elsewhere": replace_by_a_link,
    "no extents": without("incoming.index"),
    "other extents": flip("incoming.index"),
    "extents cut off": put("incoming.index", b"12345678"),
    "a huge size": edit("size", 1 << 62),
    "a huge length": edit("packed", 1 << 62),
    "a huge count": edit("extents", 1 << 59),
    "extents beyond the end": index_of((0, 512, -1), (SMALL - 512, 1024, -1)),
    "extents that overlap": index_of((0, 1024, -1), (512, 512, -1)),
    "extents in disorder": index_of((1024, 512, -1), (0, 512, -1)),
    "extents of nothing": index_of((0, 0, -1)),
    "extents before the beginning": index_of((-512, 1024, -1)),
    "extents whose sum overflows": index_of((512, (1 << 63) - 1, -1)),
    "data beyond the end of the pack": index_of((0, 4096, 1 << 40)),
    "data before its beginning": index_of((0, 4096, -4096)),
    "data whose sum overflows": index_of((0, 4096, (1 << 63) - 4096)),
    "data that lies askew": index_of((0, 512, 512)),
}


@pytest.fixture
def kept(disks: Disks, seed: int) -> tuple[Lab, bytes]:
    """A replica for which a stage is sealed."""
    lab = Lab(disks, "tmpfs", seed, SMALL)
    new = lab.change()
    lab.seal()
    return lab, new


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(kept: tuple[Lab, bytes], damage: str) -> None:
    """Before it is begun, a damaged stage is dropped; afterwards it is told, and left."""
    lab, _ = kept
    name, paths = str(lab.target), lab.order.paths
    saved = lab.disks.name("saved")
    shutil.copytree(lab.folder, saved)
    DAMAGES[damage](lab.folder)
    assert lab.record().point == point(0)
    assert lab.has_settled() == 0
    assert lab.holds(lab.old)

    shutil.copytree(saved, lab.folder, dirs_exist_ok=True)
    DAMAGES[damage](lab.folder)
    record = finish(name, paths)
    assert record is not None and record.point == point(0)
    assert not is_left(lab.folder)

    shutil.copytree(saved, lab.folder, dirs_exist_ok=True)
    record = dataclasses.replace(record, state=State.APPLYING, next=point(1))
    record.write(lab.folder / "replica.json")
    DAMAGES[damage](lab.folder)
    _, change = inspect(name, paths)
    assert ("left between two points" in change) == (damage in HEADERS)
    with pytest.raises(BlktrackError, match="is at no point: it was left between") as caught:
        finish(name, paths)
    assert "blktrack sync" in caught.value.hint
    with lab.open() as replica:
        assert "left between two points" in replica.changed
        assert replica.finished is None
        assert is_left(lab.folder)
        replica.begin(State.UNFINISHED, "generation-1")
        assert not is_left(lab.folder)
        replica.commit(point(5))
    assert lab.has_settled() == 5


def test_an_overlay_that_cannot_be_read(
    kept: tuple[Lab, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found when the replica has left its point: by the next run, and again in the run's own."""
    lab, _ = kept
    bad = from_pairs([(0, 4096)])

    def fail(*arguments: Any, **options: Any) -> Copied:
        return dataclasses.replace(copy(*arguments, **options), failed=bad)

    monkeypatch.setattr("blktrack.ship.apply.copy", fail)
    with pytest.raises(BlktrackError, match=r"is at no point: .*cannot be read"):
        finish(str(lab.target), lab.order.paths)
    with lab.open() as replica:
        assert "left between two points" in replica.changed and "4 KiB" in replica.changed
        replica.begin(State.UNFINISHED, "generation-1")
        replica.commit(point(1))
        lab.change()
        with pytest.raises(StageDamaged, match="cannot be read"), lab.staged(replica) as stage:
            replica.apply(stage)
        assert "cannot be read" in replica.changed
    assert lab.record().state is State.APPLYING


def test_a_stage_of_another_link_or_point(kept: tuple[Lab, bytes]) -> None:
    lab, _ = kept
    saved = lab.disks.name("saved")
    shutil.copytree(lab.folder, saved)
    for change in (edit("link", "link-2"), edit("base.epoch", 7), edit("base.time", 1.5)):
        shutil.copytree(saved, lab.folder, dirs_exist_ok=True)
        change(lab.folder)
        assert lab.record().next is None
        assert lab.has_settled() == 0
        assert lab.holds(lab.old)


def test_a_stage_of_a_newer_version(kept: tuple[Lab, bytes]) -> None:
    lab, new = kept
    edit("format", 2)(lab.folder)
    for touch in (lab.open, lambda: finish(str(lab.target), lab.order.paths)):
        with pytest.raises(BlktrackError, match="newer blktrack") as caught:
            touch()
        assert "upgrade" in caught.value.hint
    edit("format", 1)(lab.folder)
    edit("unknown", 1)(lab.folder)
    assert lab.has_settled() == 1
    assert lab.holds(new)


def test_full_while_staging(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    room = disks.attach(None, "tmpfs", "-o", "size=4m")
    shutil.copytree(lab.folder, room, dirs_exist_ok=True)
    shutil.rmtree(lab.folder)
    lab.folder.symlink_to(room)
    before = os.statvfs(room).f_bfree
    lab.put(os.urandom(SIZE))
    lab.order = dataclasses.replace(lab.order, extents=[[0, SIZE]], epoch=1)
    with pytest.raises(
        CopyFailed, match=r"cannot write .*incoming.pack.*: No space left"
    ) as caught:
        bring(lab.order)
    assert caught.value.exit_code == 1 and "free space" in caught.value.hint
    assert not is_left(lab.folder)
    assert os.statvfs(room).f_bfree == before
    assert lab.has_settled() == 0
    assert lab.holds(lab.old)


def test_a_seal_that_fails_at_any_step(
    disks: Disks, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: what cannot be made durable is no commit."""
    lab = Lab(disks, "tmpfs", seed)
    lab.change()
    fsync = os.fsync
    for turn in itertools.count():
        left = iter([False] * turn + [True])

        def fail_once(fd: int, left: Iterator[bool] = left) -> None:
            if next(left, False):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(fd)

        with lab.open() as replica, monkeypatch.context() as patch, contextlib.ExitStack() as after:
            after.callback(lambda: patch.setattr(os, "fsync", fsync))
            stage = after.enter_context(replica.stage())
            with open_end(str(lab.source)) as source:
                copy(source, stage.end, lab.extents)
            patch.setattr(os, "fsync", fail_once)
            try:
                stage.seal(lab.extents, point(1))
                break
            except BlktrackError as error:
                assert "No space left" in str(error)
        assert not is_left(lab.folder)
        assert lab.record().point == point(0)
    assert turn == 5, "image, list, its folder, header, its folder"
