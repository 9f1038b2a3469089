"""The threads of a copy: each reads batches, as many as it holds, and writes or compares them."""

from __future__ import annotations

import contextlib
import enum
import errno
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from blktrack.linux import PAGE, Buffer
from blktrack.ship.aio import RequestQueue
from blktrack.ship.endpoint import EndError, Endpoint
from blktrack.ship.limit import RateLimit
from blktrack.ship.plan import MAX_REQUESTS, Batch, Piece
from blktrack.ship.runs import runs

ZERO_PIECE = 64 << 10  # zeroes are looked for in aligned pieces of this size
_LOOK = 128 << 10  # of what is to be zero, so much or less is read before
_GIVE_UP = 1024  # failed reads after which a failed request is no longer searched for its good part
_GONE = {errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM, errno.EBADF}


class Mode(enum.Enum):
    """What a copy does with what it reads."""

    COPY = "copy"  # write it
    COMPARE = "compare"  # read the replica too, report what differs, write nothing
    REPAIR = "repair"  # read the replica too, write what differs


Pairs = list[tuple[int, int]]


@dataclass(slots=True)
class Outcome:
    """What became of one batch. (start, length) pairs in bytes."""

    requests: int = 0
    read: int = 0
    written: int = 0
    zeroed: int = 0
    done: Pairs = field(default_factory=list)  # now the same on the replica, or compared
    different: Pairs = field(default_factory=list)
    failed: Pairs = field(default_factory=list)


class ReadsEnded:
    """An event: the last read of the source has ended."""


Event = Outcome | ReadsEnded | BaseException | None  # None: a thread has ended


class Crew:
    """Work shared by the threads. They speak through `events` alone."""

    def __init__(
        self,
        source: Endpoint,
        replica: Endpoint,
        work: Iterator[Batch],
        *,
        mode: Mode,
        room: int,
        granularity: int,
        known_zero: bool,
        limit: RateLimit | None,
        stop: threading.Event,
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.read_ended = time.monotonic()
        self._source = source
        self._replica = replica
        self._mode = mode
        self._room = room
        self._granularity = granularity
        self._known_zero = known_zero
        self._limit = limit
        self._stop = stop
        self._abort = threading.Event()
        self._lock = threading.Lock()
        self._work = work
        self._next = next(work, None)
        self._reading = 0
        self._failed_reads = 0

    @property
    def left(self) -> bool:
        """Whether some of the work has not been taken."""
        return self._next is not None

    def abort(self) -> None:
        """Let every thread end after what it has read."""
        self._abort.set()

    def run(self) -> None:
        """The body of a thread."""
        try:
            with _Hand(self._room, compare=self._mode is not Mode.COPY) as hand:
                while held := self._fetch(hand):
                    for good, outcome in held:
                        self.events.put(self._carry(good, outcome, hand))
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._abort.set()
            self.events.put(error)
        finally:
            self.events.put(None)

    def _fetch(self, hand: _Hand) -> list[tuple[Batch, Outcome]]:
        """Read batches for as long as the buffer has room: what could be read of each.

        A copy that fits the buffers has read all before it writes much. Its source may be written
        meanwhile, and has the less time for it.
        """
        held: list[tuple[Batch, Outcome]] = []
        used = 0
        while (batch := self._take(self._room - used)) is not None:
            pieces = [Piece(start, length, at + used) for start, length, at in batch]
            used = -(-(pieces[-1].at + pieces[-1].length) // PAGE) * PAGE
            outcome = Outcome(requests=len(pieces))
            held.append((self._read(pieces, hand, outcome), outcome))
            with self._lock:
                self._reading -= 1
                if self._next is None and self._reading == 0:
                    self.read_ended = time.monotonic()
                    self.events.put(ReadsEnded())
        return held

    def _take(self, room: int) -> Batch | None:
        """The next batch, if there is one and it takes no more room."""
        with self._lock:
            if self._next is None or self._abort.is_set() or self._stop.is_set():
                return None
            batch = self._next
            if batch[-1].at + batch[-1].length > room:
                return None
            if self._limit is not None and not self._wait(self._limit, batch):
                return None
            self._next = next(self._work, None)
            self._reading += 1
            return batch

    def _wait(self, limit: RateLimit, batch: Batch) -> bool:
        """Wait until the batch may be read; False if the copy ended first. Others queue behind."""
        until = time.monotonic() + limit.take(sum(piece.length for piece in batch))
        while (left := until - time.monotonic()) > 0:
            if self._stop.wait(min(left, 0.1)) or self._abort.is_set():
                return False
        return True

    def _carry(self, good: Batch, outcome: Outcome, hand: _Hand) -> Outcome:
        """Write or compare what was read of a batch."""
        if self._mode is not Mode.COPY:
            different = self._replica.differences(
                good, hand.source, hand.replica, hand.requests(good), self._granularity
            )
            outcome.different = [(start, length) for start, length, _ in different]
        if self._mode is not Mode.COMPARE:
            self._store(good if self._mode is Mode.COPY else different, hand, outcome)
        outcome.done = [(start, length) for start, length, _ in good]
        return outcome

    def _read(self, batch: Batch, hand: _Hand, outcome: Outcome) -> Batch:
        """Read the source; the pieces, or parts of them, that could be."""
        failed = self._source.read_many(batch, hand.source, hand.requests(batch))
        if not failed:
            outcome.read += sum(length for _, length, _ in batch)
            return batch
        again = set(failed)
        good = [piece for piece in batch if piece not in again]
        outcome.read += sum(length for _, length, _ in good)
        for piece in failed:
            good += self._read_one(piece, hand.source, outcome)
        return good

    def _read_one(self, piece: Piece, buffer: Buffer, outcome: Outcome) -> Batch:
        start, length, at = piece
        try:
            self._source.read_into(buffer.view[at : at + length], start)
        except EndError as error:
            if error.errno in _GONE:
                raise
            # The readable parts are found by halving.
            self._failed_reads += 1
            middle = self._middle(start, length)
            if middle is None or self._failed_reads > _GIVE_UP:
                outcome.failed.append((start, length))
                return []
            left = middle - start
            good = self._read_one(Piece(start, left, at), buffer, outcome)
            return good + self._read_one(Piece(middle, length - left, at + left), buffer, outcome)
        outcome.read += length
        return [piece]

    def _middle(self, start: int, length: int) -> int | None:
        """A granule's edge near the middle; None within one granule."""
        unit = self._granularity
        middle = (start + length // 2) // unit * unit
        if middle <= start:
            middle = (start // unit + 1) * unit
        return middle if middle < start + length else None

    def _zero(self, pieces: Batch, hand: _Hand) -> None:
        """Make pieces of the replica zero, the small ones only if they are not: around scattered
        changes they mostly are, and a hole costs far more than a look."""
        small = [piece for piece in pieces if piece.length <= _LOOK]
        looked = False
        with contextlib.suppress(EndError):
            # Into the place of the source's zeroes, which are not needed any more.
            self._replica.read_all(small, hand.source, hand.requests(small))
            looked = True
        for start, length, at in pieces:
            if not (looked and length <= _LOOK and hand.source.is_zero(at, length)):
                self._replica.zero(start, length)

    def _store(self, pieces: Batch, hand: _Hand, outcome: Outcome) -> None:
        """Write pieces, their whole zero parts as zeroes."""
        data: Batch = []
        zeroes: Batch = []
        for start, length, at in pieces:
            shift = at - start
            for begin, end, zero in runs(
                start, start + length, ZERO_PIECE, shift, hand.source.is_zero
            ):
                part = Piece(begin, end - begin, begin + shift)
                (zeroes if zero else data).append(part)
        outcome.zeroed += sum(length for _, length, _ in zeroes)
        if not self._known_zero:
            self._zero(zeroes, hand)
        self._replica.write_many(data, hand.source, hand.requests(data))
        outcome.written += sum(length for _, length, _ in data)


# Requests of copies that ended, for the next one: giving one back to the kernel takes it 30 ms.
_idle: list[RequestQueue] = []


def _requests() -> RequestQueue:
    with contextlib.suppress(IndexError):
        return _idle.pop()
    return RequestQueue(MAX_REQUESTS)


class _Hand:
    """What one thread holds: its buffers and its requests."""

    def __init__(self, chunk: int, *, compare: bool) -> None:
        self.source = Buffer(chunk)
        self.replica = Buffer(chunk) if compare else self.source
        self._requests: RequestQueue | None = None
        self._alone = False  # each request is a call of its own, for want of AIO

    def requests(self, pieces: Batch) -> RequestQueue | None:
        """Through what to move these at once; None if one by one is as good or all there is."""
        if self._requests is None and len(pieces) > 1 and not self._alone:
            try:
                self._requests = _requests()
            except OSError:
                self._alone = True
        return self._requests if len(pieces) > 1 else None

    def __enter__(self) -> _Hand:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._requests and kind is None:
            _idle.append(self._requests)
        elif self._requests:
            self._requests.close()
