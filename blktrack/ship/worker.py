"""The threads of a copy: each takes a batch, reads it, and writes or compares it."""

from __future__ import annotations

import enum
import errno
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from blktrack.linux import Buffer
from blktrack.ship.endpoint import EndError, Endpoint
from blktrack.ship.limit import RateLimit
from blktrack.ship.plan import Batch, Piece

ZERO_PIECE = 64 << 10  # zeroes are looked for in aligned pieces of this size
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
        chunk: int,
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
        self._chunk = chunk
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
        """Let every thread end after the batch it is at."""
        self._abort.set()

    def run(self) -> None:
        """The body of a thread."""
        try:
            source = Buffer(self._chunk)
            replica = source if self._mode is Mode.COPY else Buffer(self._chunk)
            while (batch := self._take()) is not None:
                self.events.put(self._carry(batch, source, replica))
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._abort.set()
            self.events.put(error)
        finally:
            self.events.put(None)

    def _take(self) -> Batch | None:
        with self._lock:
            if self._next is None or self._abort.is_set() or self._stop.is_set():
                return None
            batch = self._next
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

    def _carry(self, batch: Batch, source: Buffer, replica: Buffer) -> Outcome:
        outcome = Outcome(requests=len(batch))
        good = self._read(batch, source, outcome)
        with self._lock:
            self._reading -= 1
            if self._next is None and self._reading == 0:
                self.read_ended = time.monotonic()
                self.events.put(ReadsEnded())
        if self._mode is Mode.COPY:
            for piece in good:
                self._store(piece, source, outcome)
        else:
            for start, length, at in good:
                self._replica.read_into(replica.view[at : at + length], start)
            for piece in good:
                self._compare(piece, source, replica, outcome)
        outcome.done = [(piece.start, piece.length) for piece in good]
        return outcome

    def _read(self, batch: Batch, buffer: Buffer, outcome: Outcome) -> Batch:
        """Read the source; the pieces that could be."""
        good: Batch = []
        view, read = buffer.view, self._source.read_into
        for piece in batch:
            start, length, at = piece
            try:
                read(view[at : at + length], start)
                good.append(piece)
                outcome.read += length
            except EndError as error:
                good += self._salvage(piece, buffer, outcome, error)
        return good

    def _salvage(
        self, piece: Piece, buffer: Buffer, outcome: Outcome, error: EndError
    ) -> Batch:
        """The readable parts of a piece whose read failed, searched by halving."""
        if error.errno in _GONE:
            raise error
        start, length, at = piece
        unit = self._granularity
        middle = (start + length // 2) // unit * unit
        if middle <= start:
            middle = (start // unit + 1) * unit
        self._failed_reads += 1
        if middle >= start + length or self._failed_reads > _GIVE_UP:
            outcome.failed.append((start, length))
            return []
        left = middle - start
        halves = [Piece(start, left, at), Piece(middle, length - left, at + left)]
        return self._read(halves, buffer, outcome)

    def _store(self, piece: Piece, buffer: Buffer, outcome: Outcome) -> None:
        """Write a piece, its whole zero parts as zeroes."""
        start, length, at = piece
        end = start + length
        shift = at - start
        begin = start  # of the run of parts that are alike
        zero = False
        while start < end:
            stop = min(end, (start // ZERO_PIECE + 1) * ZERO_PIECE)
            is_zero = buffer.is_zero(start + shift, stop - start)
            if is_zero != zero:
                self._put(begin, start, shift, zero, buffer, outcome)
                begin, zero = start, is_zero
            start = stop
        self._put(begin, end, shift, zero, buffer, outcome)

    def _put(
        self, start: int, end: int, shift: int, zero: bool, buffer: Buffer, outcome: Outcome
    ) -> None:
        if start == end:
            return
        if not zero:
            self._replica.write(buffer.view[start + shift : end + shift], start)
            outcome.written += end - start
            return
        outcome.zeroed += end - start
        if not self._known_zero:
            self._replica.zero(start, end - start)

    def _compare(
        self, piece: Piece, source: Buffer, replica: Buffer, outcome: Outcome
    ) -> None:
        start, length, at = piece
        if source.equal(at, length, replica, at):
            return
        end = start + length
        shift = at - start
        unit = self._granularity
        begin = -1  # of the run of granules that differ
        while start < end:
            stop = min(end, (start // unit + 1) * unit)
            if source.equal(start + shift, stop - start, replica, start + shift):
                if begin >= 0:
                    self._differs(begin, start, shift, source, outcome)
                    begin = -1
            elif begin < 0:
                begin = start
            start = stop
        if begin >= 0:
            self._differs(begin, end, shift, source, outcome)

    def _differs(
        self, start: int, end: int, shift: int, source: Buffer, outcome: Outcome
    ) -> None:
        outcome.different.append((start, end - start))
        if self._mode is Mode.REPAIR:
            self._store(Piece(start, end - start, start + shift), source, outcome)
