"""The copy engine against plain bytes, on real devices and file systems."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from blktrack import extent, linux
from blktrack.errors import Busy, CopyFailed
from blktrack.extent import ExtentArray, from_pairs
from blktrack.linux import Buffer
from blktrack.rates import Rates
from blktrack.ship import copy as engine
from blktrack.ship import worker
from blktrack.ship.aio import RequestQueue
from blktrack.ship.copy import CHUNK, THREADS, Mode, copy
from blktrack.ship.endpoint import DeviceEnd, EndError, Endpoint, FileEnd, open_end
from blktrack.ship.limit import BURST, RateLimit
from blktrack.ship.plan import MAX_REQUESTS, Piece, batches, chunk_for
from blktrack.units import KIB, MIB, SECTOR
from tests.faultfs import FaultFile
from tests.loopdev import Disks

PRIME = 4099  # sectors: about 2 MiB, whose end lies in no block larger than a sector


def image(rng: np.random.Generator, size: int, zeroes: float = 0.4) -> bytearray:
    """Random bytes in which runs of 64 KiB pieces, and some odd ranges, are zero."""
    data = rng.integers(0, 256, size, dtype=np.uint8)
    for start in range(0, size, 64 * KIB):
        if rng.random() < zeroes:
            data[start : start + 64 * KIB] = 0
    for _ in range(5):
        start = int(rng.integers(size))
        data[start : start + int(rng.integers(1, 100 * KIB))] = 0
    return bytearray(data)


def random_extents(rng: np.random.Generator, size: int, unit: int = SECTOR) -> ExtentArray:
    """Disjoint extents in multiples of `unit`, small and large, often with the device's end."""
    pairs = []
    for _ in range(int(rng.integers(1, 60))):
        start = int(rng.integers(size // unit)) * unit
        length = int(rng.integers(1, int(rng.choice([3, 9, 100, 2000])))) * unit
        pairs.append((start, min(length, size - start)))
    if rng.random() < 0.5:
        pairs.append((size - unit, unit))
    return from_pairs(pairs)


def whole(size: int) -> ExtentArray:
    return from_pairs([(0, size)])


def fill(path: Path, data: bytes | bytearray) -> None:
    with path.open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if path.is_block_device():
            linux.flush_buffers(file.fileno())


def content(path: Path) -> bytes:
    with path.open("rb") as file:
        if path.is_block_device():
            linux.flush_buffers(file.fileno())
        return file.read()


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def patched(old: bytes | bytearray, new: bytes | bytearray, extents: ExtentArray) -> bytes:
    """`old` with the extents of `new` in it: what a copy has to make of a replica."""
    result = bytearray(old)
    for start, length in extents.tolist():
        result[start : start + length] = new[start : start + length]
    return bytes(result)


def lists(extents: ExtentArray) -> list[list[int]]:
    return [[int(start), int(length)] for start, length in extents]


def differences(
    old: bytes | bytearray, new: bytes | bytearray, extents: ExtentArray, unit: int
) -> list[list[int]]:
    """The parts of aligned units, within the extents, that differ."""
    pairs = []
    for start, length in extents.tolist():
        end = start + length
        while start < end:
            stop = min(end, (start // unit + 1) * unit)
            if old[start:stop] != new[start:stop]:
                pairs.append((start, stop - start))
            start = stop
    return lists(from_pairs(pairs))


MakeReplica = Callable[[Disks, int], Path]


def on_ext4(sector: int) -> MakeReplica:
    def make(disks: Disks, size: int) -> Path:
        point = disks.mount(disks.loop(64 * MIB, sector=sector), "ext4")
        return sparse(point / "replica", size)

    return make


def on_xfs(disks: Disks, size: int) -> Path:
    return sparse(disks.mount(disks.loop(512 * MIB), "xfs") / "replica", size)


def on_tmpfs(disks: Disks, size: int) -> Path:
    return sparse(disks.name("replica"), size)


def on_device(sector: int) -> MakeReplica:
    return lambda disks, size: disks.loop(-(-size // sector) * sector, sector=sector)


PLACES = [
    pytest.param(512, on_device(512), id="512-to-512"),
    pytest.param(4096, on_device(4096), id="4k-to-4k"),
    pytest.param(4096, on_device(512), id="4k-to-512"),
    pytest.param(512, on_tmpfs, id="512-to-tmpfs"),
    pytest.param(512, on_ext4(512), id="512-to-ext4", marks=pytest.mark.needs("ext4")),
    pytest.param(512, on_ext4(4096), id="512-to-ext4-of-4k", marks=pytest.mark.needs("ext4")),
    pytest.param(512, on_xfs, id="512-to-xfs", marks=pytest.mark.needs("xfs")),
]


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize(("sector", "make"), PLACES)
def test_any_copy_is_what_bytes_would_be(
    disks: Disks, sector: int, make: MakeReplica, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = PRIME * SECTOR // sector * sector
    source_path = disks.loop(size, sector=sector)
    replica_path = make(disks, size)
    new, old = image(rng, size), image(rng, size)
    fill(replica_path, old)
    expected = bytes(old)
    for _ in range(12):
        mode = Mode(rng.choice([mode.value for mode in Mode]))
        extents = random_extents(rng, size, sector)
        # Mostly alike, as for a resync, else all different.
        new = image(rng, size) if rng.random() < 0.5 else bytearray(expected)
        for _ in range(3):
            new[int(rng.integers(size))] ^= 1
        fill(source_path, new)
        unit = int(rng.choice([4096, 64 * KIB]))
        with (
            open_end(str(source_path)) as source,
            open_end(str(replica_path), writable=True) as replica,
        ):
            done: list[list[int]] = []
            copied = copy(
                source,
                replica,
                extents,
                mode=mode,
                granularity=unit,
                checkpoint=lambda settled, done=done: done.extend(settled.tolist()),  # type: ignore[misc]
                threads=int(rng.integers(1, 6)),
                chunk=int(rng.choice([64 * KIB, 256 * KIB, 4 * MIB])),
            )
        differing = differences(expected, new, extents, unit)
        if mode is not Mode.COMPARE:
            expected = patched(expected, new, extents)
            assert sorted(done) == extents.tolist()
        else:
            assert done == []
        assert copied.bytes_read == extent.total(extents)
        assert not copied.interrupted
        assert copied.failed.tolist() == []
        assert copied.different.tolist() == ([] if mode is Mode.COPY else differing)
        moved = {
            Mode.COPY: extent.total(extents),
            Mode.REPAIR: sum(length for _, length in differing),
            Mode.COMPARE: 0,
        }[mode]
        assert copied.bytes_written + copied.bytes_zeroed == moved
        assert content(replica_path)[:size] == expected


@pytest.mark.needs("root", "loop")
def test_many_small_extents(disks: Disks, seed: int) -> None:
    size = 32 * MIB
    rng = np.random.default_rng(seed)
    data = rng.integers(1, 256, size, dtype=np.uint8).tobytes()
    source, replica = disks.loop(size), disks.loop(size)
    fill(source, data)
    extents = from_pairs([(start, 4096) for start in range(0, size, 8192)])
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copied = copy(one, other, extents)
    assert copied.requests == len(extents) == 4096
    assert copied.bytes_written == 16 * MIB
    assert content(replica) == patched(bytes(size), data, extents)


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize("lacking", ["requests", "direct", "both"])
def test_without_what_a_kernel_may_lack(
    disks: Disks, lacking: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def refuse(depth: int) -> None:
        raise OSError(errno.ENOSYS, "no AIO")

    monkeypatch.setattr(worker, "_idle", [])
    if lacking != "direct":
        monkeypatch.setattr(worker, "RequestQueue", refuse)
    if lacking != "requests":
        monkeypatch.setattr("blktrack.ship.endpoint._open_direct", lambda fd, mode: (-1, 1))
    rng = np.random.default_rng(seed)
    size = PRIME * SECTOR
    data = image(rng, size)
    source = disks.loop(size)
    replica = sparse(disks.name("replica"), size)
    fill(source, data)
    extents = random_extents(rng, size)
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copy(one, other, extents)
    assert replica.read_bytes() == patched(bytes(size), data, extents)


@pytest.mark.needs("root", "loop", "ext4")
def test_zeroes_become_holes(disks: Disks) -> None:
    size = 8 * MIB
    source = disks.loop(size)
    with source.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"data" * 16 * KIB)
    point = disks.mount(disks.loop(64 * MIB), "ext4")
    for name, known_zero in [("fresh", True), ("sparse", False), ("full", False)]:
        replica = sparse(point / name, size)
        if name == "full":
            fill(replica, b"\xff" * size)
        with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
            copied = copy(one, other, whole(size), known_zero=known_zero)
        assert (copied.bytes_written, copied.bytes_zeroed) == (64 * KIB, size - 64 * KIB)
        assert replica.read_bytes() == source.read_bytes()
        assert replica.stat().st_blocks * 512 <= 72 * KIB, name
    # Nothing is put where it was promised that zeroes are: the price of a wrong promise.
    fill(replica, b"\xff" * size)
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copy(one, other, whole(size), known_zero=True)
    assert replica.read_bytes()[:MIB] == b"\xff" * MIB


@pytest.mark.needs("root", "loop")
def test_zeroes_free_the_space_of_a_device(disks: Disks) -> None:
    source, file = disks.loop(4 * MIB), disks.name("replica")
    file.write_bytes(b"\xff" * 4 * MIB)
    replica = disks.loop(file=file)
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copied = copy(one, other, whole(4 * MIB))
    assert copied.bytes_written == 0
    assert content(replica) == bytes(4 * MIB)
    assert file.stat().st_blocks == 0


def in_step(end: Endpoint) -> threading.Semaphore:
    """Let writes of a batch of one request wait for each other: one per release, the first free."""
    turn, write = threading.Semaphore(1), end.write

    def wait_and_write(view: memoryview, offset: int) -> None:
        assert turn.acquire(timeout=30)
        write(view, offset)

    end.write = wait_and_write  # type: ignore[method-assign]
    return turn


@pytest.mark.needs("root", "loop")
def test_interrupted_copy_resumes_from_its_checkpoints(disks: Disks, seed: int) -> None:
    size = 16 * MIB
    data = np.random.default_rng(seed).integers(1, 256, size, dtype=np.uint8).tobytes()
    source, replica = disks.loop(size), disks.loop(size)
    fill(source, data)
    left, reads, runs = whole(size), 0, 0
    while len(left):
        stop = threading.Event()
        settled: list[tuple[int, int]] = []

        def checkpoint(extents: ExtentArray, settled: list[tuple[int, int]] = settled) -> None:
            settled += [(start, length) for start, length in extents.tolist()]
            for start, length in extents.tolist():
                assert content(replica)[start : start + length] == data[start : start + length]

        with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
            turn = in_step(other)

            def progress(
                done: int, turn: threading.Semaphore = turn, stop: threading.Event = stop
            ) -> None:
                if done >= 3 * MIB:
                    stop.set()
                turn.release()

            copied = copy(
                one, other, left, progress=progress, checkpoint=checkpoint, stop=stop,
                chunk=256 * KIB, interval=0.0,
            )  # fmt: skip
        runs += 1
        reads += copied.bytes_read
        rest = np.ones(size // SECTOR, dtype=bool)
        old = np.ones(size // SECTOR, dtype=bool)
        for start, length in left.tolist():
            old[start // SECTOR : (start + length) // SECTOR] = False
        for start, length in settled:
            rest[start // SECTOR : (start + length) // SECTOR] = False
        rest &= ~old
        assert copied.interrupted == bool(rest.any())
        left = from_pairs([(int(i) * SECTOR, SECTOR) for i in np.flatnonzero(rest)])
    assert runs > 2
    assert reads == size, "nothing is read twice, and nothing is left out"
    assert content(replica) == data


class Recorder(FileEnd):
    """A replica that notes in which order things happen to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), writable=True)
        self.events: list[str] = []
        self.may_write = threading.Event()
        self.may_write.set()
        self.broken = False

    def _write(self, view: memoryview, offset: int) -> None:
        assert self.may_write.wait(30)
        super()._write(view, offset)

    def write_many(self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue) -> None:
        assert self.may_write.wait(30)
        super().write_many(pieces, buffer, requests)

    def _sync(self) -> None:
        self.events.append("flush")
        if self.broken:
            raise OSError(errno.EIO, "broken")
        super()._sync()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Endpoint, Recorder]]:
    """A source of 2 MiB of data and a replica, both files."""
    (tmp_path / "source").write_bytes(b"\x11" * 2 * MIB)
    sparse(tmp_path / "replica", 2 * MIB)
    with open_end(str(tmp_path / "source")) as source, Recorder(tmp_path / "replica") as replica:
        yield source, replica


def copy_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("copy-")]


def test_a_checkpoint_follows_its_flush(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    turn = in_step(replica)
    copy(
        source, replica, whole(2 * MIB), interval=0.0, chunk=64 * KIB,
        checkpoint=lambda extents: replica.events.append("checkpoint"),
        progress=lambda done: turn.release(),
    )  # fmt: skip
    assert len(replica.events) > 2
    assert replica.events == ["flush", "checkpoint"] * (len(replica.events) // 2)


def test_without_a_checkpoint_flushing_is_the_callers(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    copied = copy(source, replica, whole(2 * MIB), interval=0.0, chunk=64 * KIB)
    assert copied.bytes_written + copied.bytes_zeroed == 2 * MIB
    assert replica.events == []


def test_nothing_is_durable_after_a_failed_flush(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    replica.broken = True
    told: list[ExtentArray] = []
    with pytest.raises(CopyFailed, match=r"cannot flush .*replica: Input/output error"):
        copy(source, replica, whole(2 * MIB), interval=0.0, chunk=256 * KIB, checkpoint=told.append)
    assert told == []
    assert replica.events == ["flush"], "a second flush could succeed and prove nothing"
    assert copy_threads() == []


def test_reads_are_over_before_writes_are(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    replica.may_write.clear()
    seen: list[tuple[str, float]] = []

    def read_done() -> None:
        seen.append((threading.current_thread().name, time.monotonic()))
        replica.may_write.set()

    begun = time.monotonic()
    copied = copy(source, replica, whole(2 * MIB), read_done=read_done, threads=8)
    assert [name for name, _ in seen] == [threading.current_thread().name]
    assert begun < copied.read_ended <= seen[0][1]


def test_what_fits_the_buffers_is_read_before_any_of_it_is_written(
    files: tuple[Endpoint, Recorder],
) -> None:
    source, replica = files
    replica.may_write.clear()
    places = from_pairs([(at, 4 * KIB) for at in range(0, 2 * MIB, 8 * KIB)])
    copied = copy(source, replica, places, read_done=replica.may_write.set, threads=1)
    assert copied.requests > 2 * MAX_REQUESTS
    read = np.frombuffer(content(Path(replica.path)), dtype=np.uint8).reshape(-1, 4 * KIB)
    assert (read[::2] == 0x11).all()
    assert not read[1::2].any()


def test_callbacks_that_raise_end_the_copy(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("progress", "checkpoint", "read_done"):
        with pytest.raises(KeyboardInterrupt):
            copy(source, replica, whole(2 * MIB), **{name: interrupt})  # type: ignore[arg-type]
        assert copy_threads() == []


def test_nothing_to_copy(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    called: list[str] = []
    copied = copy(
        source, replica, extent.empty(),
        read_done=lambda: called.append("read"),
        checkpoint=lambda extents: called.append("checkpoint"),
    )  # fmt: skip
    assert called == ["read"]
    assert replica.events == []
    assert (copied.requests, copied.bytes_read, copied.interrupted) == (0, 0, False)


def test_stopped_before_it_began(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    stop = threading.Event()
    stop.set()
    copied = copy(source, replica, whole(2 * MIB), stop=stop)
    assert copied.interrupted
    assert copied.bytes_read == 0


def test_progress_only_grows_to_the_total(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    told: list[int] = []
    copy(source, replica, whole(2 * MIB), progress=told.append, chunk=64 * KIB)
    assert told == sorted(told)
    assert told[-1] == 2 * MIB
    assert len(told) == 32


@pytest.mark.needs("root")
def test_full_file_system(disks: Disks) -> None:
    source = disks.name("source")
    source.write_bytes(b"\x22" * 4 * MIB)
    point = disks.attach(None, "tmpfs", "-o", "size=1m")
    replica = sparse(point / "replica", 4 * MIB)
    settled: list[list[int]] = []
    with (
        open_end(str(source)) as one,
        open_end(str(replica), writable=True) as other,
        pytest.raises(EndError) as caught,
    ):
        copy(
            one, other, whole(4 * MIB), chunk=256 * KIB,
            checkpoint=lambda extents: settled.extend(extents.tolist()),
        )  # fmt: skip
    error = caught.value
    assert error.errno == errno.ENOSPC
    assert error.extent is not None and error.extent.length == 256 * KIB
    assert str(error) == f"cannot write {replica} at {error.extent}: No space left on device"
    assert "free space" in error.hint
    assert copy_threads() == []
    for start, length in settled:
        assert replica.read_bytes()[start : start + length] == b"\x22" * length


@pytest.fixture
def faulty(disks: Disks) -> Iterator[tuple[FaultFile, Path]]:
    """A disk of 16 MiB that fails where it is told to, filled with 0x33."""
    fault = disks.held.enter_context(FaultFile(disks.folder, 16 * MIB))
    fault.backing.write_bytes(b"\x33" * 16 * MIB)
    yield fault, disks.loop(file=fault.path)


FAULTS = [(4096, 4096), (5 * MIB + 512, 512), (9 * MIB, 20 * KIB), (16 * MIB - 4096, 4096)]
GRANULES = [[4096, 4096], [5 * MIB, 4096], [9 * MIB, 20 * KIB], [16 * MIB - 4096, 4096]]


@pytest.mark.needs("root", "loop", "fuse")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_unreadable_places_of_the_source(
    disks: Disks, faulty: tuple[FaultFile, Path], mode: Mode, small: bool
) -> None:
    fault, source = faulty
    replica = disks.loop(16 * MIB)
    fault.fail(reads=FAULTS)
    extents = whole(16 * MIB)
    pairs = [(start, 8192) for start in range(0, 16 * MIB, 8192)]
    if small:  # as requests of their own, moved in batches
        extents = np.array(pairs, dtype=np.int64)
    settled: list[list[int]] = []
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copied = copy(
            one, other, extents, mode=mode, granularity=4096,
            checkpoint=lambda extents: settled.extend(extents.tolist()),
        )  # fmt: skip
    assert copied.failed.tolist() == GRANULES
    bad = sum(length for _, length in GRANULES)
    assert copied.bytes_read == 16 * MIB - bad
    expected = bytearray(b"\x33" * 16 * MIB)
    for start, length in GRANULES:
        expected[start : start + length] = bytes(length)
    if mode is Mode.COMPARE:
        assert extent.total(copied.different) == 16 * MIB - bad
        assert content(replica) == bytes(16 * MIB)
        return
    assert copied.bytes_written == 16 * MIB - bad
    assert content(replica) == expected
    assert sum(length for _, length in settled) == 16 * MIB - bad
    # What failed is all that is left to do once the disk can be read again.
    fault.fail()
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        assert copy(one, other, copied.failed, mode=mode).failed.tolist() == []
    assert content(replica) == b"\x33" * 16 * MIB


@pytest.mark.needs("root", "loop", "fuse")
def test_a_dead_source_is_not_searched_for_ever(
    disks: Disks, faulty: tuple[FaultFile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, source = faulty
    monkeypatch.setattr(worker, "_GIVE_UP", 10)
    fault.fail(reads=[(0, 16 * MIB)])
    with open_end(str(source)) as one, open_end(str(disks.loop(16 * MIB)), writable=True) as other:
        copied = copy(one, other, whole(16 * MIB))
    assert copied.failed.tolist() == [[0, 16 * MIB]]
    assert copied.bytes_read == 0


@pytest.mark.needs("root", "loop", "fuse")
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_replica_that_cannot_be_written(
    disks: Disks, faulty: tuple[FaultFile, Path], small: bool
) -> None:
    fault, replica = faulty
    fault.fail(writes=[(7 * MIB + 4096, 4096)])
    source = disks.loop(16 * MIB)
    fill(source, b"\x44" * 16 * MIB)
    extents = whole(16 * MIB)
    if small:
        extents = from_pairs([(start, 4096) for start in range(4096, 16 * MIB, 8192)])
    settled: list[list[int]] = []
    with (
        open_end(str(source)) as one,
        open_end(str(replica), writable=True) as other,
        pytest.raises(EndError, match="Input/output error") as caught,
    ):
        copy(one, other, extents, checkpoint=lambda extents: settled.extend(extents.tolist()))
    assert caught.value.path == str(replica)
    place = caught.value.extent
    assert place is not None and place.start <= 7 * MIB + 4096 < place.end
    for start, length in settled:
        assert not (start < 7 * MIB + 8192 and start + length > 7 * MIB + 4096)
        assert fault.backing.read_bytes()[start : start + length] == b"\x44" * length


def test_source_that_shrank(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * MIB)
    replica = sparse(tmp_path / "replica", 2 * MIB)
    with (
        open_end(str(tmp_path / "source")) as one,
        open_end(str(replica), writable=True) as other,
        pytest.raises(CopyFailed, match=r"cannot read .*source at .*: No such device"),
    ):
        copy(one, other, whole(2 * MIB))
    assert copy_threads() == []


def test_limit_holds(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    begun = time.monotonic()
    copied = copy(source, replica, whole(2 * MIB), limit=Rates(4 * MIB))
    assert copied.bytes_written == 2 * MIB
    # Half a second, less what may be caught up and the last request, which nothing follows.
    assert 0.1 < time.monotonic() - begun < 30
    assert replica.read(0, 4096) == b"\x11" * 4096


def test_stop_does_not_wait_for_the_limit(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    stop = threading.Event()
    copied = copy(
        source, replica, whole(2 * MIB), limit=Rates(1), stop=stop, progress=lambda done: stop.set()
    )  # the first request is free: the rest would take days
    assert copied.interrupted
    assert copied.bytes_written == 64 * KIB


def test_rate_limit_on_a_clock_of_its_own() -> None:
    now = 100.0
    limit = RateLimit(Rates(1000), clock=lambda: now)
    assert limit.take(500) == 0.0
    assert limit.take(500) == pytest.approx(0.5)
    assert limit.take(10) == pytest.approx(1.0)
    now += 1.01
    assert limit.take(100) == 0.0
    now += 1000.0  # a long pause is caught up by no more than the burst
    assert limit.take(int(1000 * BURST)) == 0.0
    assert limit.take(1) == 0.0
    assert limit.take(1) == pytest.approx(0.001)
    with pytest.raises(ValueError, match="positive"):
        RateLimit(Rates(0))


@pytest.mark.parametrize("chunk", [64 * KIB, MIB, 4 * MIB])
def test_batches_cover_each_extent_once(chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 64 * MIB
    extents = random_extents(rng, size)
    pairs = []
    for batch in batches(extents, chunk):
        assert 0 < len(batch) <= MAX_REQUESTS
        used: set[int] = set()
        for piece in batch:
            assert piece.length > 0
            assert piece.at + piece.length <= chunk
            assert piece.at % linux.PAGE == piece.start % linux.PAGE
            assert piece.start // chunk == (piece.start + piece.length - 1) // chunk
            pages = set(range(piece.at // 4096, -(-(piece.at + piece.length) // 4096)))
            assert not used & pages
            used |= pages
            pairs.append((piece.start, piece.length))
    assert pairs == sorted(pairs)
    assert sum(length for _, length in pairs) == extent.total(extents)
    assert from_pairs(pairs).tolist() == extents.tolist()


def test_batch_sizes() -> None:
    assert THREADS * CHUNK * 2 <= 32 * MIB
    tera = whole(1 << 40)
    assert chunk_for(tera, CHUNK, THREADS, None) == CHUNK
    assert chunk_for(whole(42 * MIB), CHUNK, THREADS, None) == 2 * MIB
    assert chunk_for(whole(512), CHUNK, THREADS, None) == 256 * KIB
    assert chunk_for(tera, CHUNK, THREADS, 8 * MIB) == MIB
    assert chunk_for(tera, CHUNK, THREADS, 1) == 64 * KIB
    assert engine.copy is copy


@pytest.mark.needs("root", "loop")
def test_a_replica_device_is_claimed(disks: Disks) -> None:
    device = str(disks.loop(MIB, sector=4096))
    with DeviceEnd(device, writable=True) as end:
        with pytest.raises(EndError, match="Device or resource busy"):
            DeviceEnd(device, writable=True)
        DeviceEnd(device).close()
        assert (end.size, end.align) == (MIB, 4096)
        with pytest.raises(ValueError, match="blocks of 4096"):
            end.write(memoryview(bytes(512)), 0)
        end.write(linux.Buffer(4096).view, MIB - 4096)
        with pytest.raises(EndError, match=r"at 1048576\+4096: No space left"):
            end.write(linux.Buffer(4096).view, MIB)
        end.flush()
        assert end.read(MIB - 100, 100) == bytes(100)


def test_a_replica_file_is_locked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    one, other = FileEnd(str(path)), FileEnd(str(path))
    with one, other, pytest.raises(Busy, match="held by another run"):
        FileEnd(str(path), writable=True)
    with FileEnd(str(path), writable=True) as end, path.open() as file:
        with pytest.raises(Busy, match="held by another run"):
            FileEnd(str(path))
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert end.read(4990, 10) == b"x" * 10
        end.zero(1, 4998)
        assert path.read_bytes() == b"x" + bytes(4998) + b"x"
        end.resize(9000)
        assert (end.size, path.stat().st_size) == (9000, 9000)
    with pytest.raises(EndError, match="No such file"):
        open_end(str(tmp_path / "absent"))


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize("kind", ["file", "device"])
def test_zeroing_falls_back_to_writing(
    disks: Disks, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def cannot(name: str) -> Callable[[int, int, int], None]:
        def fail(fd: int, start: int, length: int) -> None:
            tried.append(name)
            raise OSError(errno.EOPNOTSUPP, "not here")

        return fail

    monkeypatch.setattr(linux, "punch_hole", cannot("punch"))
    monkeypatch.setattr(linux, "zero_out", cannot("zero"))
    path = disks.loop(4 * MIB) if kind == "device" else sparse(disks.name("file"), 4 * MIB)
    fill(path, b"\xff" * 4 * MIB)
    with open_end(str(path), writable=True) as end:
        end.zero(MIB - 512, 2 * MIB + 1024)
        end.zero(0, 512)
        end.flush()
    assert tried == (["punch", "zero"] if kind == "device" else ["punch"]), "remembered"
    expected = bytearray(b"\xff" * 4 * MIB)
    expected[MIB - 512 : 3 * MIB + 512] = bytes(2 * MIB + 1024)
    expected[:512] = bytes(512)
    assert content(path) == expected


@pytest.mark.needs("root", "loop")
def test_a_repair_of_more_granules_than_go_at_once(disks: Disks) -> None:
    """A few large reads, and every other granule of them differs."""
    size = 4 * MIB
    data = np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8)
    other = data.copy()
    other.reshape(-1, 4 * KIB)[::2] ^= 1
    paths = [disks.loop(size), disks.loop(size)]
    for path, bytes_ in zip(paths, (data, other), strict=True):
        fill(path, bytes_.tobytes())
    with open_end(str(paths[0])) as source, open_end(str(paths[1]), writable=True) as replica:
        done = copy(
            source,
            replica,
            whole(size),
            mode=Mode.REPAIR,
            granularity=4 * KIB,
            threads=1,
            chunk=size,
        )
    assert len(done.different) == size // (8 * KIB) > MAX_REQUESTS
    assert done.bytes_written == size // 2
    assert content(paths[1]) == data.tobytes()
