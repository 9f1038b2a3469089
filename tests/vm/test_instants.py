"""The oracles of write logs know right from wrong: no machine is needed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from blktrack.units import KIB, SECTOR
from tests import sectors
from tests.sectors import Image
from tests.vm.instants import History, Segment, Trace
from tests.vm.writelog import DISCARD, FLUSH, MAGIC, WriteLog, digests

SECTORS = 48


def write_log(
    path: Path, rows: list[tuple[int, int, int, bytes]], sector: int = SECTOR
) -> WriteLog:
    """A log of (sector, sectors, flags, data), in sectors of the log."""

    def padded(data: bytes) -> bytes:
        return data.ljust(sector, b"\0")

    words = [int(word).to_bytes(8, "little") for word in (MAGIC, 1, len(rows))]
    made = padded(b"".join(words) + sector.to_bytes(4, "little"))
    for start, count, flags, data in rows:
        head = b"".join(int(word).to_bytes(8, "little") for word in (start, count, flags, 0))
        made += padded(head) + data
    path.write_bytes(made)
    return WriteLog(path)


@pytest.mark.parametrize("sector", [512, 4096])
def test_any_prefix_is_replayed(tmp_path: Path, sector: int) -> None:
    one, two = (sectors.make(0, 2 * sector, number).tobytes() for number in (1, 2))
    rows = [
        (0, 2, 0, one),
        (0, 0, FLUSH, b""),
        (1, 2, 0, two),
        (0, 1, DISCARD, b""),
        (3, 1, 0, two[:sector]),
    ]
    log = write_log(tmp_path / "log", rows, sector)
    states = [b"\0" * 4 * sector, one, one, one[:sector] + two, b"\0" * sector + two]
    states.append(b"\0" * sector + two + two[:sector])
    for last, state in enumerate(states):
        image = np.zeros(4 * sector, dtype=np.uint8)
        log.replay(image, 0, last)
        assert image.tobytes() == state.ljust(4 * sector, b"\0")
    log.replay(image, 0, 2)
    assert image.tobytes()[: 3 * sector] == one + two[sector:]


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\0" * KIB)
    with pytest.raises(ValueError, match="no write log"):
        WriteLog(tmp_path / "log")
    write_log(tmp_path / "log", [(0, 1, 0, b"\1" * SECTOR)])
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="ends within an entry"):
        WriteLog(tmp_path / "log")


def test_digests_tell_sectors_apart() -> None:
    image = np.zeros(64 * SECTOR, dtype=np.uint8)
    rows = image.reshape(64, SECTOR)
    for number in range(1, 64):
        rows[number, number * 8 + 7] = 0x80  # the highest bit of a word
        rows[number, 7] = 0x80 * (number % 2)
    assert len(set(digests(image).tolist())) == 64


@dataclass
class Change:
    start: int
    count: int
    data: Image
    begin: int
    end: int = 1 << 30
    landed: bool = False

    def meets(self, start: int, count: int) -> bool:
        return self.start < start + count and start < self.start + self.count


@dataclass
class Disk:
    """A made-up disk with several changes in flight at any time, its log and its trace."""

    seed: int
    lines: list[str] = field(default_factory=list)
    rows: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    order: list[Change] = field(default_factory=list)  # as they landed
    open_: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def step(self) -> None:
        match self.random.randrange(3):
            case 0 if len(self.open_) < 6:
                count = self.random.randrange(1, 7)
                start = self.random.randrange(SECTORS - count + 1)
                if not any(each.meets(start, count) for each in self.open_):
                    # Few contents, so that many versions are alike.
                    number = self.random.randrange(4)
                    data = sectors.make(start * SECTOR, count * SECTOR, number)
                    if number == 0:
                        data[:] = 0
                    self.open_.append(Change(start, count, data, len(self.lines)))
                    self.say("issue", self.open_[-1])
            case 1 if waiting := [each for each in self.open_ if not each.landed]:
                change = self.random.choice(waiting)
                change.landed = True
                self.order.append(change)
                self.rows.append((change.start, change.count, 0, change.data.tobytes()))
            case 2 if waiting := [each for each in self.open_ if each.landed]:
                change = self.random.choice(waiting)
                self.open_.remove(change)
                change.end = len(self.lines)
                self.say("complete", change)

    def say(self, what: str, change: Change) -> None:
        size = f"{change.count * SECTOR} " if what == "issue" else ""
        place = f"{change.start + 3} + {change.count}"  # the source begins at sector 3
        self.lines.append(f"x-1 [000] d..1. 5.1: block_rq_{what}: 8,0 WS {size}() {place} [x]")
        self.lines.append(f"x-1 [000] d..1. 5.1: block_rq_{what}: 8,16 WS {size}() {place} [x]")

    def allowed(self, instant: int) -> list[set[bytes]]:
        """What each sector may hold at an instant, told one by one."""
        found: list[set[bytes]] = [{b"\0" * SECTOR} for _ in range(SECTORS)]
        for change in self.order:
            for number in range(change.count):
                held = found[change.start + number]
                if change.end <= instant:
                    held.clear()
                if change.begin <= instant:
                    held.add(change.data[number * SECTOR :][:SECTOR].tobytes())
        return found


def made(seed: int, path: Path) -> tuple[Disk, History]:
    disk = Disk(seed)
    while len(disk.order) < 120:
        disk.step()
    while disk.open_:
        disk.step()
    log = write_log(path, disk.rows)
    trace = Trace(disk.lines, (8, 0), 3 * SECTOR, bio=False)
    segment = Segment(0, SECTORS * SECTOR, "d", 0)
    return disk, History({"d": log}, [segment], trace, SECTORS * SECTOR)


def test_states_of_an_instant_are_told_from_mixed_ones(tmp_path: Path, seed: int) -> None:
    """As from a second opinion, which looks at each instant and each sector."""
    seen = {True: 0, False: 0}
    for turn in range(6):
        disk, history = made(seed + turn, tmp_path / "log")
        last = len(disk.lines) - 1
        allowed = [disk.allowed(instant) for instant in range(last + 1)]
        for _ in range(40):
            instant = disk.random.randrange(last + 1)
            state = [disk.random.choice(sorted(each)) for each in allowed[instant]]
            for _ in range(disk.random.randrange(6)):  # parts of another time
                other = allowed[min(max(instant + disk.random.randrange(-90, 90), 0), last)]
                number = disk.random.randrange(SECTORS)
                state[number] = disk.random.choice(sorted(other[number]))
            right = [
                at
                for at, sets in enumerate(allowed)
                if all(own in each for own, each in zip(state, sets, strict=True))
            ]
            image = np.frombuffer(b"".join(state), dtype=np.uint8)
            verdict = history.judge(digests(image), 0, last)
            expected = (right[0], right[-1]) if right else None
            assert verdict.instants == expected, f"seed {seed + turn}: {verdict.fault}"
            seen[bool(right)] += 1
            assert right or "sectors are not of then" in verdict.fault
            # Of another time than was asked for.
            if right and right[-1] < last:
                assert history.judge(digests(image), right[-1] + 1, last).instants is None
    assert min(seen.values()) > 20, seen


def test_what_was_never_written_is_no_state(tmp_path: Path, seed: int) -> None:
    disk, history = made(seed, tmp_path / "log")
    image = np.zeros(SECTORS * SECTOR, dtype=np.uint8)
    write_log(tmp_path / "log", disk.rows).replay(image)
    last = len(disk.lines) - 1
    whole = history.judge(digests(image), 0, last)
    assert whole.instants and whole.instants[1] == last
    assert whole.prefix == 0 and (history.newest() == digests(image)).all()
    image[5 * SECTOR + 17] ^= 1  # a torn sector
    verdict = history.judge(digests(image), 0, last)
    assert verdict.instants is None and verdict.prefix == 1
    assert "sector 5 holds what was never written there" in verdict.fault


def test_a_log_that_misses_a_change_is_noticed(tmp_path: Path, seed: int) -> None:
    disk, _ = made(seed, tmp_path / "log")
    log = write_log(tmp_path / "short", disk.rows[:-1])
    trace = Trace(disk.lines, (8, 0), 3 * SECTOR, bio=False)
    segment = Segment(0, SECTORS * SECTOR, "d", 0)
    with pytest.raises(AssertionError, match="changes that no log has"):
        History({"d": log}, [segment], trace, SECTORS * SECTOR)


def test_traces_of_requests_and_bios_are_read() -> None:
    text = """\
     d-5 [000] .....  1.1: tracing_mark_write: begin 3
     d-5 [000] .....  1.2: block_rq_issue: 259,0 WFS 4096 () 16 + 8 be,0,4 [d]
     d-5 [000] .....  1.2: block_bio_queue: 253,0 FWFS 16 + 8 [d]
     d-5 [000] .....  1.2: block_rq_issue: 259,0 RA 4096 () 24 + 8 none,0,0 [d]
     d-5 [000] .....  1.2: block_rq_issue: 259,0 FF 0 () 0 + 0 none,0,0 [d]
     d-5 [000] .....  1.2: block_rq_issue: 259,0 DS 8192 () 32 + 16 none,0,0 [d]
     d-5 [000] .....  1.2: block_rq_requeue: 259,0 DS () 32 + 16 none,0,0 [0]
     d-5 [000] .....  1.2: block_rq_issue: 259,0 DS 8192 () 32 + 16 none,0,0 [d]
     d-5 [000] .....  1.3: block_rq_complete: 259,0 WFS () 16 + 4 be,0,4 [0]
     d-5 [000] .....  1.3: block_rq_complete: 259,0 WFS () 20 + 4 be,0,4 [0]
     d-5 [000] .....  1.3: block_bio_complete: 253,0 FWFS 20 + 4 [0]
     d-5 [000] .....  1.4: block_rq_complete: 259,0 DS () 32 + 16 none,0,0 [0]
     d-5 [000] .....  1.5: block_rq_issue: 259,0 NS 512 () 7 + 1 none,0,0 [d]
     d-5 [000] .....  1.5: tracing_mark_write: end 3
""".splitlines()
    trace = Trace(text, (259, 0), 0, bio=False)
    assert trace.marks == {"begin 3": 0, "end 3": 13}
    assert trace.changes[:2] == [(16, 8, 1, 9), (32, 16, 7, 11)]
    assert trace.changes[2][:3] == (7, 1, 12) and trace.unended == 1
    assert Trace(text, (253, 0), 0, bio=True).changes == [(16, 8, 2, 10)]
