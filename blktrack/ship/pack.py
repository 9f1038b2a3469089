"""Data of scattered extents, packed: a file that only grows, and an index that says what is where.

An image with the data at its own offsets would need no index. But one of 20,000 scattered blocks is
as many pieces of a file: on ext4, mounted with `discard`, it took 14 to 31 s to be removed. A pack
is written in large requests and is of a few pieces.

Each range lies in the pack as it lies in its page of the source, so that direct I/O and reflinks
can take it from there. Rows of the index are (start, length, place in the pack); ZERO as a place:
the range reads as zeroes. A later row overrides an earlier one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from blktrack.errors import CopyFailed
from blktrack.linux import PAGE, Buffer
from blktrack.ship.aio import RequestQueue
from blktrack.ship.end import EndError, Endpoint
from blktrack.ship.endpoint import FileEnd
from blktrack.ship.plan import Piece
from blktrack.units import format_size

# Shape (n, 3), see above. A resolved one is sorted by start and disjoint.
Index = NDArray[np.int64]

ZERO = -1
ROW = 24  # bytes of a row
_GATHER = 1 << 20  # bytes of small writes that wait for each other
_LARGE = 256 << 10  # a write of so much goes alone
_STEP = 64 << 20  # by which the file grows: a write beyond its end is a slow one


class TooMuchStaged(CopyFailed):
    """What is staged may not become larger; what was taken so far can be kept."""

    def __init__(self, path: str, most: int) -> None:
        super().__init__(
            f"the increment staged in {path} is larger than the {format_size(most)} that it may be",
            hint="allow more where the replica is (--max-staging), or run blktrack sync --in-place:"
            " it stages nothing, but the replica is at no point until it ends",
        )


class Packer(Endpoint):
    """The end of a copy that packs what is written to it, from several threads at once."""

    def __init__(
        self,
        file: FileEnd,
        size: int,
        rows: Index | None = None,
        most: int | None = None,
    ) -> None:
        """file -- this one's from here on. size -- of the source. rows -- of what is in the file
        already, which goes on behind its end; without them it is empty. most -- bytes that the file
        and its rows may take: TooMuchStaged, of a write that would take more."""
        super().__init__(file.path, size, align=1)
        self._file = file
        self._rows = array("q")  # of what is in the file
        self._late = array("q")  # of what waits, and of zeroes that came after it
        if rows is not None:
            self._rows.frombytes(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
        self._lock = threading.Lock()
        self._used = self._grown = 0 if rows is None else file.size
        self._most = most
        self._waiting: Buffer | None = None
        self._fill = 0  # bytes of what waits
        self._zero_ways = [self._note_zero]

    def fileno(self) -> int:
        return self._file.fileno()

    def index(self) -> Index:
        """Rows as they were written."""
        with self._lock:
            return np.array(self._rows + self._late, dtype=np.int64).reshape(-1, 3)

    def settle(self, first: int) -> tuple[Index, int]:
        """Write what waits; the rows from number `first` on, and the length of the file that they
        need. Durable after `flush_file`."""
        with self._lock:
            self._pass_on()
            rows = np.array(self._rows[3 * first :], dtype=np.int64).reshape(-1, 3)
            return rows, self._used

    def flush_file(self) -> None:
        """Make what is in the file durable."""
        try:
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise EndError(self.path, "flush", None, error) from error

    def finish(self) -> int:
        """Write what waits, cut the file to what is used and make it durable; its length."""
        with self._lock:
            self._pass_on()
            try:
                os.ftruncate(self._file.fileno(), self._used)
            except OSError as error:
                raise EndError(self.path, "resize", None, error) from error
        self._file.flush()
        return self._used

    def write_many(
        self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
    ) -> None:
        for place, begin, end, inside in _runs([(piece, piece.at) for piece in pieces]):
            if end - begin < _LARGE:
                for start, length, at in inside:
                    self.write(buffer.view[at : at + length], start)
                continue
            at = self._reserve(end - begin)
            self._file.write(buffer.view[begin:end], at)
            with self._lock:
                for piece in inside:
                    self._rows.extend((piece.start, piece.length, at + piece.at - place))

    def _write(self, view: memoryview, offset: int) -> None:
        shift, length = offset % PAGE, len(view)
        room = _pages(shift + length)
        if room >= _LARGE:
            at = self._reserve(room) + shift
            self._file.write(view, at)
            with self._lock:
                self._rows.extend((offset, length, at))
            return
        with self._lock:
            if self._waiting is None:
                self._waiting = Buffer(_GATHER)
            self._check_room(room)
            if self._fill + room > _GATHER:
                self._pass_on()
            at = self._fill + shift
            self._waiting.view[at : at + length] = view
            self._fill += room
            self._late.extend((offset, length, self._used + at))

    def _pass_on(self) -> None:
        """Write what waits, at the end, as its rows say already. If that fails, they go."""
        late, self._late = self._late, array("q")
        if self._fill and self._waiting is not None:
            at, fill, self._fill = self._used, self._fill, 0
            self._used += fill
            self._grow()
            self._file.write(self._waiting.view[:fill], at)
        self._rows.extend(late)

    def _check_room(self, room: int) -> None:
        """TooMuchStaged if so many bytes and their row would be too many."""
        if self._most is None:
            return
        rows = (len(self._rows) + len(self._late)) // 3 + 1
        if self._used + self._fill + room + rows * ROW > self._most:
            raise TooMuchStaged(self.path, self._most)

    def _reserve(self, room: int) -> int:
        with self._lock:
            self._check_room(room)
            self._pass_on()
            at = self._used
            self._used += room
            self._grow()
            return at

    def _grow(self) -> None:
        if self._used > self._grown:
            self._grown = self._used + _STEP
            with contextlib.suppress(OSError):  # a limit: what is written may still be within it
                os.ftruncate(self._file.fileno(), self._grown)

    def _note_zero(self, start: int, length: int) -> None:
        with self._lock:
            self._check_room(0)
            # It may override what waits.
            (self._late if self._late else self._rows).extend((start, length, ZERO))

    def _read(self, view: memoryview, offset: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _sync(self) -> None:
        """Nothing: `finish` does it for all."""

    def close(self) -> None:
        self._file.close()


class Unpacker(Endpoint):
    """A pack as the source of a copy: the ranges of an index, each read by itself or in parts."""

    def __init__(self, file: FileEnd, index: Index, size: int) -> None:
        """index -- resolved."""
        super().__init__(file.path, size, file.align)
        self._file = file
        self._index = index

    def read_many(
        self, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
    ) -> list[Piece]:
        asked: list[tuple[Piece, int]] = []
        for piece, place in zip(pieces, self._places(pieces), strict=True):
            if place == ZERO:
                _clear(buffer.view[piece.at : piece.at + piece.length])
            else:
                asked.append((piece, place))
        runs = list(_runs(asked))
        whole = [Piece(place, end - begin, begin) for place, begin, end, _ in runs]
        failed = set(self._file.read_many(whole, buffer, requests)) if whole else set()
        left: list[Piece] = []
        for run, (*_, inside) in zip(whole, runs, strict=True):
            if run in failed:
                try:
                    self._file.read_into(buffer.view[run.at : run.at + run.length], run.start)
                except EndError:
                    left += inside
        return left

    def _places(self, pieces: list[Piece]) -> list[int]:
        """Where each lies in the pack; ValueError if it is not within one range of the index."""
        starts = np.array([piece.start for piece in pieces], dtype=np.int64)
        ends = starts + np.array([piece.length for piece in pieces], dtype=np.int64)
        row = np.searchsorted(self._index[:, 0], starts, side="right") - 1
        found = self._index[row]
        if (row < 0).any() or (ends > found[:, 0] + found[:, 1]).any():
            raise ValueError("a piece is not within a range of the index")
        places = np.where(found[:, 2] == ZERO, ZERO, found[:, 2] + starts - found[:, 0])
        return [int(place) for place in places]

    def _read(self, view: memoryview, offset: int) -> None:
        (place,) = self._places([Piece(offset, len(view), 0)])
        if place == ZERO:
            _clear(view)
        else:
            self._file.read_into(view, place)

    def _write(self, view: memoryview, offset: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _sync(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        self._file.close()


def resolve(index: Index) -> Index:
    """The same ranges, each byte once, by its last row: sorted by start, disjoint."""
    order = np.argsort(index[:, 0], kind="stable")
    rows = index[order]
    if len(rows) < 2 or (rows[1:, 0] >= rows[:-1, 0] + rows[:-1, 1]).all():
        return joined(rows)
    start, end = index[:, 0], index[:, 0] + index[:, 1]
    edges = np.unique(np.concatenate([start, end]))
    owner = np.full(len(edges), -1, dtype=np.int64)  # of what begins at each edge
    first, last = np.searchsorted(edges, start), np.searchsorted(edges, end)
    for row, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        owner[low:high] = row
    begins = np.flatnonzero((owner >= 0) & (owner != np.r_[-1, owner[:-1]]))
    ends = np.flatnonzero((owner >= 0) & (owner != np.r_[owner[1:], -1])) + 1
    whose = index[owner[begins]]
    low, high = edges[begins], edges[ends]
    places = np.where(whose[:, 2] == ZERO, ZERO, whose[:, 2] + low - whose[:, 0])
    return joined(np.stack([low, high - low, places], axis=1))


def joined(index: Index) -> Index:
    """Rows that go on where the one before ends, both here and in the pack, as one."""
    if len(index) < 2:
        return index
    before, after = index[:-1], index[1:]
    zero = (before[:, 2] == ZERO) & (after[:, 2] == ZERO)
    data = (before[:, 2] != ZERO) & (after[:, 2] == before[:, 2] + before[:, 1])
    goes_on = (after[:, 0] == before[:, 0] + before[:, 1]) & (zero | data)
    first = np.flatnonzero(np.r_[True, ~goes_on])
    last = np.r_[first[1:], len(index)] - 1
    rows = index[first].copy()
    rows[:, 1] = index[last, 0] + index[last, 1] - rows[:, 0]
    return rows


def fault(index: Index, size: int, packed: int) -> str:
    """Why this is no resolved index of a source of `size` bytes and a pack of `packed`; "" if it
    is."""
    if why := fault_of_rows(index, size, packed):
        return why
    if (index[1:, 0] < index[:-1, 0] + index[:-1, 1]).any():
        return "the extents are not sorted, or overlap"
    return ""


def fault_of_rows(index: Index, size: int, packed: int) -> str:
    """The same of rows in any order, which may override each other."""
    if not len(index):
        return ""
    start, length, place = index.T
    # With both within the size no difference can overflow.
    if start.min() < 0 or length.min() <= 0 or start.max() > size or length.max() > size:
        return "an extent has no place"
    if (start > size - length).any():
        return "an extent is beyond the end"
    data = place != ZERO
    if (place[data] < 0).any() or (place[data] > packed - length[data]).any():
        return "an extent has no data"
    return "an extent lies askew" if ((place - start)[data] % PAGE).any() else ""


def _runs(
    pieces: list[tuple[Piece, int]],
) -> Iterator[tuple[int, int, int, list[Piece]]]:
    """Pieces and their places in the pack as runs of whole pages that lie one behind another both
    there and in the buffer: place, begin and end in the buffer, the pieces inside."""
    inside: list[Piece] = []
    place = begin = end = 0
    for piece, at in pieces:
        low = piece.at // PAGE * PAGE
        page = at // PAGE * PAGE
        if inside and low == end and page == place + end - begin:
            inside.append(piece)
        else:
            if inside:
                yield place, begin, end, inside
            inside, place, begin = [piece], page, low
        end = _pages(piece.at + piece.length)
    if inside:
        yield place, begin, end, inside


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _clear(view: memoryview) -> None:
    np.frombuffer(view, dtype=np.uint8)[:] = 0
