"""Whether a copy of a device is a state that a power cut at one instant could have left.

Two records are put together. The write log of the disk below (tests/vm/writelog.py) says which
contents each sector had, one after another: its versions. The kernel's own trace of the device says
when the write that made a version was begun, before the driver saw it, and when it ended, before
who waited for it heard. A copy is of instant T if every sector holds a version that was begun by T,
and none of the later ones of that sector had ended by T. So what had ended is there; what was not
begun is not; what was in flight at T may be there, sector by sector: that is all that is given to
the prefix of the log that was written at T, and it is given by the one T of all sectors.

In particular, of a write that had ended before another was begun nothing is missing where any of
the other is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blktrack.units import SECTOR
from tests.vm.writelog import WriteLog, digests

Numbers = NDArray[np.int64]
_NEVER = np.int64(1) << 40  # an instant after all others
_BEFORE = np.int64(-1)  # before the trace began

# include/trace/events/block.h. Since 6.10 a request has its priority, too.
_EVENT = re.compile(
    r": block_(bio|rq)_(queue|issue|requeue|complete): (\d+),(\d+) (\w+) "
    r"(?:\d+ )?(?:\([^)]*\) )?(\d+) \+ (\d+) "
)
_MARK = re.compile(r": tracing_mark_write: (.*)")
_CHANGES = re.compile(r"F?[WDNZ]")  # N: zeroes are written


class Segment(NamedTuple):
    """Bytes of a source, and where they lie on a logged disk."""

    start: int
    length: int
    disk: str  # serial number
    at: int


class Trace:
    """What the kernel saw of the changes of one device, in order: instants are lines of it."""

    def __init__(
        self, lines: Iterable[str], device: tuple[int, int], start: int, bio: bool
    ) -> None:
        """`start` is the byte of the traced disk at which the source begins; `bio`: it is driven
        by bios, not by requests."""
        self.marks: dict[str, int] = {}
        self.changes: list[tuple[int, int, int, int]] = []  # sector, count, begin, end
        kind, open_ = "bio" if bio else "rq", dict[int, tuple[int, int, int]]()
        for line, text in enumerate(lines):
            if mark := _MARK.search(text):
                self.marks[mark[1].strip()] = line
                continue
            event = _EVENT.search(text)
            if not event or event[1] != kind or (int(event[3]), int(event[4])) != device:
                continue
            if not _CHANGES.match(event[5]):
                continue
            sector, count = int(event[6]) - start // SECTOR, int(event[7])
            # By its end: a bio that was split shows only its last part when it completes, and of a
            # request of several parts the last completion counts. Two at once never end alike.
            end = sector + count
            if event[2] == "complete":
                if end in open_ and (bio or count):
                    self.changes.append((*open_.pop(end), line))
            elif event[2] == "requeue":
                open_.pop(end, None)
            elif count:
                assert end not in open_, f"two changes of one place in flight: {text}"
                open_[end] = sector, count, line
        self.unended = len(open_)
        self.changes += [(*begun, int(_NEVER)) for begun in open_.values()]
        self.changes.sort(key=lambda change: change[2])


class Verdict(NamedTuple):
    """`instants` at which all sectors can be as they are, the first and the last; None: there is
    none, and `fault` says what the best one leaves. `prefix`: the number of sectors that are not as
    after that prefix of each log which fits best: they were in flight."""

    instants: tuple[int, int] | None
    prefix: int
    fault: str = ""


class History:
    """All versions of all sectors of a source, sorted by sector, then by age."""

    def __init__(
        self, logs: dict[str, WriteLog], segments: Sequence[Segment], trace: Trace, size: int
    ) -> None:
        self.sectors = size // SECTOR
        self._number(logs, segments)
        self._date(trace)

    def _number(self, logs: dict[str, WriteLog], segments: Sequence[Segment]) -> None:
        """The versions. Number 0, of no entry, is that of a new image: zeroes."""
        zero = digests(np.zeros(SECTOR, dtype=np.uint8))[0]
        sectors, entries = [np.arange(self.sectors)], [np.full(self.sectors, -1)]
        found = [np.full(self.sectors, zero)]
        for segment in segments:
            log, move = logs[segment.disk], segment.start - segment.at
            for number, entry in enumerate(log.entries):
                first = max(entry.start, segment.at)
                last = min(entry.start + entry.length, segment.at + segment.length)
                if first < last and entry.is_change:
                    own = np.arange((first + move) // SECTOR, (last + move) // SECTOR)
                    data = log.data(entry)[first - entry.start : last - entry.start]
                    sectors.append(own)
                    entries.append(np.full(len(own), number))
                    found.append(digests(np.ascontiguousarray(data)))
        sector, entry_ = np.concatenate(sectors), np.concatenate(entries)
        order = np.lexsort((entry_, sector))
        self.sector, self.entry = sector[order], entry_[order]
        self.digest = np.concatenate(found)[order]
        self.logs = np.zeros(self.sectors, dtype=np.int64)  # the segment of each sector
        for number, segment in enumerate(segments):
            self.logs[segment.start // SECTOR :] = number

    def _date(self, trace: Trace) -> None:
        """When each was begun and ended. Those older than the trace have no change in it."""
        table = np.array(trace.changes, dtype=np.int64).reshape(-1, 4)
        inside = (table[:, 0] >= 0) & (table[:, 0] + table[:, 1] <= self.sectors)
        table = table[inside]
        sector = np.concatenate([np.arange(s, s + n) for s, n in table[:, :2].tolist()])
        begin, end = (np.repeat(table[:, column], table[:, 1]) for column in (2, 3))
        order = np.argsort(sector, kind="stable")
        sector, begin, end = sector[order], begin[order], end[order]
        same = sector[1:] == sector[:-1]
        assert (begin[1:] > end[:-1])[same].all(), "changes of one place overlap in time"
        have = np.bincount(self.sector, minlength=self.sectors)
        seen = np.bincount(sector, minlength=self.sectors)
        assert (have > seen).all(), "the trace has changes that no log has"
        # From the youngest on: where a version has its change, counted within its sector.
        rank = np.arange(len(self.sector)) - np.repeat(np.cumsum(have) - have, have)
        nth = rank - np.repeat(have - seen, have)
        dated = nth >= 0
        at = (np.repeat(np.cumsum(seen) - seen, have) + nth)[dated]
        self.begin = np.full(len(self.sector), _BEFORE)
        self.end = self.begin.copy()
        self.begin[dated], self.end[dated] = begin[at], end[at]
        self.undated = int((~dated & (self.entry >= 0)).sum())
        self._until = _first_later(self.sector, self.end) - 1
        self._replaced = _first_later(self.sector, self.entry) - 1

    def newest(self) -> NDArray[np.uint64]:
        """The digests that the source has in the end."""
        last = np.append(self.sector[1:] != self.sector[:-1], True)
        return np.asarray(self.digest[last])

    def judge(self, point: NDArray[np.uint64], first: int, last: int) -> Verdict:
        """Whether a point, of which these are the digests, is of an instant from `first` to `last`,
        lines of the trace."""
        held = np.flatnonzero(self.digest == point[self.sector])
        sector = self.sector[held]
        fit = _fits(sector, self.begin[held], self._until[held], first, last)
        prefix = 0
        for number in range(int(self.logs.max()) + 1):
            own = held[self.logs[sector] == number]
            most = int(self.entry.max()) + 1
            prefixes = _fits(self.sector[own], self.entry[own], self._replaced[own], -1, most)
            prefix += int((self.logs == number).sum()) - int(prefixes.max())
        best = int(fit.max())
        instants = np.flatnonzero(fit == best) + first
        if best == self.sectors:
            return Verdict((int(instants[0]), int(instants[-1])), prefix)
        return Verdict(None, prefix, self._fault(point, held, int(instants[0])))

    def _fault(self, point: NDArray[np.uint64], held: Numbers, instant: int) -> str:
        fits = held[(self.begin[held] <= instant) & (self._until[held] >= instant)]
        wrong = np.setdiff1d(np.arange(self.sectors), self.sector[fits])
        lines = [f"at best, line {instant}, {len(wrong)} of {self.sectors} sectors are not of then"]
        for number in wrong[:4].tolist():
            own = np.flatnonzero(self.sector == number)
            rows = [
                f"entry {self.entry[v]}, begun {self.begin[v]}, ended {self.end[v]}"
                for v in own[self.digest[own] == point[number]].tolist()
            ]
            due = own[self.begin[own] <= instant][-1]
            lines.append(
                f"  sector {number} holds {' or '.join(rows) or 'what was never written there'}; "
                f"due is entry {self.entry[due]}, begun {self.begin[due]}, ended {self.end[due]}"
            )
        return "\n".join(lines)


def _first_later(sector: Numbers, when: Numbers) -> Numbers:
    """For each version the least `when` of all later ones of its sector."""
    # A sector's numbers are all below those of the next, so that a minimum does not reach it.
    apart = np.minimum(when, _NEVER) + sector * (_NEVER * 2)
    least = np.minimum.accumulate(apart[::-1])[::-1] - sector * (_NEVER * 2)
    found = np.full(len(when), _NEVER)
    same = sector[1:] == sector[:-1]
    found[:-1][same] = least[1:][same]
    return found


def _fits(sector: Numbers, begin: Numbers, until: Numbers, first: int, last: int) -> Numbers:
    """For each instant from `first` to `last`, how many sectors fit: those of which a version that
    they hold was there from its `begin` `until` a later one had to be."""
    begin, until = np.maximum(begin, first), np.minimum(until, last)
    # Several versions of a sector may be alike, and there at once: each instant counts one of them.
    later = np.flatnonzero(sector[1:] == sector[:-1]) + 1
    begin[later] = np.maximum(begin[later], until[later - 1] + 1)
    good = begin <= until
    steps = np.bincount(begin[good] - first, minlength=last - first + 2)
    steps -= np.bincount(until[good] - first + 1, minlength=last - first + 2)
    return np.asarray(np.cumsum(steps)[:-1])
