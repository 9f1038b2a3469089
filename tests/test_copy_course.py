"""The course of a copy: checkpoints, callbacks, stops and limits, and the order of its steps."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blktrack import extent, linux
from blktrack.errors import CopyFailed
from blktrack.extent import ExtentArray, from_pairs
from blktrack.linux import Buffer
from blktrack.rates import Rates
from blktrack.ship import copy as engine
from blktrack.ship.aio import RequestQueue
from blktrack.ship.copy import CHUNK, THREADS, copy
from blktrack.ship.endpoint import Endpoint, FileEnd, open_end
from blktrack.ship.limit import BURST, RateLimit
from blktrack.ship.plan import MAX_REQUESTS, Piece, batches, chunk_for
from blktrack.units import KIB, MIB, SECTOR
from tests.copies import content, copy_threads, fill, random_extents, sparse, whole
from tests.loopdev import Disks


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

    def write_many(
        self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
    ) -> None:
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


def test_a_checkpoint_is_due_after_so_many_bytes(files: tuple[Endpoint, Recorder]) -> None:
    source, replica = files
    turn = in_step(replica)
    told: list[ExtentArray] = []
    copy(
        source, replica, whole(2 * MIB), interval=1e9, checkpoint_bytes=256 * KIB, chunk=64 * KIB,
        checkpoint=told.append, progress=lambda done: turn.release(),
    )  # fmt: skip
    sizes = [extent.total(extents) for extents in told]
    # Not once the last batch is taken: what is done by then is settled at the end.
    assert sizes[:6] == [256 * KIB] * 6
    assert sum(sizes) == 2 * MIB
    assert sizes[-1] <= 512 * KIB
    assert len(replica.events) == len(told)


def test_zeroes_count_towards_a_checkpoint(tmp_path: Path) -> None:
    sparse(tmp_path / "source", 2 * MIB)
    (tmp_path / "replica").write_bytes(b"\x11" * 2 * MIB)
    told: list[ExtentArray] = []
    turn = threading.Semaphore(1)
    with open_end(str(tmp_path / "source")) as source, Recorder(tmp_path / "replica") as replica:
        zero = replica.zero

        def wait_and_zero(start: int, length: int) -> None:
            assert turn.acquire(timeout=30)
            zero(start, length)

        replica.zero = wait_and_zero  # type: ignore[method-assign]
        copied = copy(
            source, replica, whole(2 * MIB), interval=1e9, checkpoint_bytes=512 * KIB,
            chunk=256 * KIB, checkpoint=told.append, progress=lambda done: turn.release(),
        )  # fmt: skip
    assert copied.bytes_written == 0
    assert extent.total(told[0]) == 512 * KIB


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
