"""The copy engine: extents from one end to the other, several requests in flight.

Each of a few threads reads batches of requests into its own buffer, until it is full, and writes
them, so that reads of one overlap writes of another and memory is bounded. The requests of a batch
are in flight together. The calling thread only counts, reports and makes durable; every callback
runs in it. The first error ends the copy.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from blktrack import crash
from blktrack.errors import CopyFailed
from blktrack.extent import ExtentArray, empty, from_pairs, total
from blktrack.rates import UNLIMITED, Rates
from blktrack.ship.endpoint import Endpoint
from blktrack.ship.limit import RateLimit
from blktrack.ship.plan import batches, chunk_for
from blktrack.ship.worker import Crew, Event, Mode, Outcome, Pairs, ReadsEnded

__all__ = ["CHUNK", "THREADS", "Copied", "Mode", "copy"]

THREADS = 4
CHUNK = 4 << 20  # bytes of a buffer; a comparison needs two per thread: 32 MiB in all
_LEAST = 64 << 10  # and of one where what is not durable is to be little
_PATIENCE = 0.5  # seconds without news after which the calling thread looks up


@dataclass
class Copied:
    """What a copy did. Extents are ExtentArrays, in bytes."""

    bytes_read: int = 0  # of the source
    bytes_written: int = 0
    bytes_zeroed: int = 0  # zero on the source: punched, zeroed, or known to be zero already
    requests: int = 0
    different: ExtentArray = field(default_factory=empty)  # COMPARE and REPAIR
    failed: ExtentArray = field(default_factory=empty)  # the source could not be read there
    interrupted: bool = False  # `stop` ended it before the last extent
    read_ended: float = 0.0  # time.monotonic() after the last read of the source


def copy(
    source: Endpoint,
    replica: Endpoint,
    extents: ExtentArray,
    *,
    mode: Mode = Mode.COPY,
    granularity: int = 4096,
    progress: Callable[[int], None] | None = None,
    checkpoint: Callable[[ExtentArray], None] | None = None,
    interval: float = 5.0,
    checkpoint_bytes: int | None = None,
    read_done: Callable[[], None] | None = None,
    stop: threading.Event | None = None,
    limit: Rates = UNLIMITED,
    known_zero: bool = False,
    threads: int = THREADS,
    chunk: int = CHUNK,
) -> Copied:
    """Copy, compare or repair `extents`, which lie within both ends.

    granularity -- bytes to which differences and unreadable places are narrowed down: a multiple of
        both ends' blocks.
    progress -- called often with the bytes dealt with so far.
    checkpoint -- called every `interval` seconds and at the end (also of an interrupted or failed
        copy), after a flush, with the extents that became durable since the last call: each is
        reported once. Not called by COMPARE. Without it nothing is flushed: that is the caller's.
    checkpoint_bytes -- a checkpoint is also due once so many bytes of extents were dealt with since
        the last one, whatever the time; what the threads have in hand is less than a quarter more.
    read_done -- called once, when the last read of the source has ended and writes may go on; not
        if the copy was stopped.
    stop -- set it to end early: what is under way is finished and reported.
    limit -- bytes of the source to read per second.
    known_zero -- the replica reads as zeroes in all of `extents`: zeroes need not be put there.

    Raises CopyFailed if the replica fails, or the source is gone; then everything that `checkpoint`
    was told of is durable. Places of the source that cannot be read do not raise: see `failed`.
    """
    least = limit.least
    if checkpoint_bytes is not None and mode is Mode.COPY:
        # What a thread has in hand is not done until all of it is.
        chunk = min(chunk, max(checkpoint_bytes // (8 * threads), _LEAST))
    most, chunk = chunk, chunk_for(extents, chunk, threads, least)
    crew = Crew(
        source,
        replica,
        batches(extents, chunk),
        mode=mode,
        room=most if mode is Mode.COPY and least is None else chunk,
        granularity=granularity,
        known_zero=known_zero,
        limit=RateLimit(limit) if least else None,
        stop=stop or threading.Event(),
    )
    ledger = _Ledger(
        replica, None if mode is Mode.COMPARE else checkpoint, interval, checkpoint_bytes
    )
    threads = min(threads, -(-total(extents) // chunk) + len(extents))
    workers = [threading.Thread(target=crew.run, name=f"copy-{i}") for i in range(threads)]
    try:
        for worker in workers:
            worker.start()
        error = _follow(crew, ledger, len(workers), progress, read_done)
    finally:
        crew.abort()
        for worker in workers:
            if worker.ident is not None:  # it was started
                worker.join()
    if error is not None:
        with contextlib.suppress(CopyFailed):
            ledger.settle()
        raise error
    if read_done is not None and not workers:
        read_done()
    ledger.settle()
    return ledger.result(interrupted=crew.left, read_ended=crew.read_ended)


def _follow(
    crew: Crew,
    ledger: _Ledger,
    running: int,
    progress: Callable[[int], None] | None,
    read_done: Callable[[], None] | None,
) -> BaseException | None:
    """Take in the events of the threads until all have ended; the first error."""
    error: BaseException | None = None
    while running:
        event: Event = Outcome()
        with contextlib.suppress(queue.Empty):  # a slow disk must not keep a checkpoint waiting
            event = crew.events.get(timeout=_PATIENCE)
        if event is None:
            running -= 1
        elif isinstance(event, Outcome):
            ledger.add(event)
            if progress is not None:
                progress(ledger.bytes_done)
            # Near the end the flush would only hold up `read_done` and double the last one. Over a
            # slow link the end is long: what the threads have read is minutes of sending. It is
            # long for a flush too, and what has come meanwhile is to be in the next one.
            wanted = (crew.left or ledger.bounded) and error is None and crew.events.empty()
            if wanted and ledger.due():
                ledger.settle()
        elif isinstance(event, ReadsEnded):
            if read_done is not None:
                read_done()
        else:
            error = error or event
    return error


class _Ledger:
    """Counts outcomes, and reports extents once they are durable."""

    def __init__(
        self,
        replica: Endpoint,
        checkpoint: Callable[[ExtentArray], None] | None,
        interval: float,
        most: int | None,
    ) -> None:
        self.bytes_done = 0
        self._replica = replica
        self._checkpoint = checkpoint
        self._interval = interval
        self._most = most
        self._settled = time.monotonic()
        self._unsettled = 0  # bytes of `_done`
        self._sum = Outcome()
        self._done: Pairs = []  # not yet durable
        self._flush_failed = False

    def add(self, outcome: Outcome) -> None:
        kept = self._sum
        kept.requests += outcome.requests
        kept.read += outcome.read
        kept.written += outcome.written
        kept.zeroed += outcome.zeroed
        kept.different += outcome.different
        kept.failed += outcome.failed
        self.bytes_done += sum(length for _, length in outcome.done)
        self.bytes_done += sum(length for _, length in outcome.failed)
        if self._checkpoint is not None:
            self._done += outcome.done
            self._unsettled += sum(length for _, length in outcome.done)

    @property
    def bounded(self) -> bool:
        """Whether what is under way is to be bounded in bytes."""
        return self._most is not None

    def due(self) -> bool:
        if self._most is not None and self._unsettled >= self._most:
            return True
        waited = time.monotonic() - self._settled
        return bool(self._done) and waited >= self._interval

    def settle(self) -> None:
        """Make what was done durable and report it, if anybody wants to know."""
        if self._checkpoint is None or not self._done or self._flush_failed:
            return
        # A failed flush may have dropped the data and the next one succeed: never ask again.
        self._flush_failed = True
        self._replica.flush()
        self._flush_failed = False
        done, self._done, self._unsettled = self._done, [], 0
        crash.point("copy-flushed")
        self._checkpoint(from_pairs(done))
        crash.point("copy-checkpoint")
        self._settled = time.monotonic()

    def result(self, *, interrupted: bool, read_ended: float) -> Copied:
        kept = self._sum
        return Copied(
            bytes_read=kept.read,
            bytes_written=kept.written,
            bytes_zeroed=kept.zeroed,
            requests=kept.requests,
            different=from_pairs(kept.different),
            failed=from_pairs(kept.failed),
            interrupted=interrupted,
            read_ended=read_ended,
        )
