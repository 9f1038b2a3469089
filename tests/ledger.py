"""Transactions that tell on whatever loses, reorders or tears them.

A writer commits transactions 1, 2, 3 and so on. Number n adds entry n, puts n into slot n % SLOTS,
and says how many of the other writer's it knew to be committed before it began: those are older.
After a power cut the database must hold a prefix of every writer's, at least as long as what was
acknowledged, and all that the entries in it had seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.blockdev import TOP, wait_until
from tests.chains import Log

WRITERS, SLOTS = 2, 32
BURST = 20  # transactions at most


@dataclass(frozen=True)
class Found:
    """What a database holds of one writer, entries by their number."""

    entries: Sequence[tuple[int, int, str]]  # number, seen of the other writer, text
    slots: dict[int, int]


class Damaged(Exception):
    """A database does not recover, or finds damage in itself."""


class Session(Protocol):
    """A writer's connection. `commit` returns when the transaction is durable."""

    def last(self) -> int: ...

    def commit(self, number: int, seen: int, text: str) -> None: ...


class Software(Protocol):
    module: str  # that is run as a writer

    def serve(self, folder: Path) -> AbstractContextManager[list[str]]:
        """Make new databases in the folder; the words that lead a writer to them."""

    def recover(self, folder: Path) -> list[Found]:
        """Open them as after a power cut, check them, read what each writer has there. Damaged."""


def text_of(writer: int, number: int) -> str:
    """Of 64 to 1024 bytes, so that pages split and fill at odd places."""
    digest = hashlib.sha256(f"{writer} {number}".encode()).hexdigest()
    return digest * (1 + int(digest[:4], 16) % 16)


def work(session: Session, name: str, log_path: str, pace: str, seed: str) -> None:
    """Commit transactions until killed: without a pause if the pace is 0, otherwise in bursts, so
    many a second on average. A crash point is reached between bursts, often at the edge of one.
    """
    log, writer = Log(Path(log_path), WRITERS), int(name)
    chance = random.Random(f"{seed} {writer}")
    last = session.last()
    if last > log.done[writer]:  # whoever was before was killed before it could tell
        log.ends[writer, last] = time.time()
        log.done[writer] = last
    while True:
        burst = chance.randint(1, BURST)
        for _ in range(burst):
            number = int(log.done[writer]) + 1
            session.commit(number, int(log.done[1 - writer]), text_of(writer, number))
            log.ends[writer, number] = time.time()
            log.done[writer] = number
        if float(pace):
            time.sleep(burst / float(pace))


@contextlib.contextmanager
def writers(
    module: str, words: Sequence[str], log_path: Path, pace: float, seed: int
) -> Iterator[Log]:
    """All writers, each a process of `python -m module *words writer log pace seed`."""
    log = Log(log_path, WRITERS)
    before = log.done.copy()
    running = []
    try:
        for writer in range(WRITERS):
            own = [str(word) for word in (writer, log_path, pace, seed)]
            command = [sys.executable, "-m", module, *words, *own]
            running.append(subprocess.Popen(command, cwd=TOP))

        def all_write() -> bool:
            assert all(process.poll() is None for process in running), "a writer has died"
            return bool((log.done > before + 2).all())

        wait_until(all_write, "some transactions of every writer")
        yield log
        assert all(process.poll() is None for process in running), "a writer has died"
    finally:
        for process in running:
            process.kill()
            process.wait()


def judge(found: Sequence[Found], log: Log, point: float) -> str:
    """What is wrong with a database recovered from a point; "" if nothing is."""
    for writer, of in enumerate(found):
        numbers = [number for number, _, _ in of.entries]
        last = len(numbers)
        if numbers != list(range(1, last + 1)):
            return f"writer {writer}: {last} entries are not numbered 1 to {last}"
        if wrong := [n for n, _, text in of.entries if text != text_of(writer, n)]:
            return f"writer {writer}: entries {wrong[:5]} have another text"
        expected = {number % SLOTS: number for number in numbers}
        if of.slots != {slot: expected.get(slot, 0) for slot in range(SLOTS)}:
            return f"writer {writer}: the slots are not as after transaction {last}"
        if last < (least := log.completed_before(writer, point)):
            return f"writer {writer}: ends at {last}, {least} were acknowledged before the point"
        other = len(found[1 - writer].entries)
        if (seen := max((seen for _, seen, _ in of.entries), default=0)) > other:
            return f"writer {writer} had seen {seen} of the other, who ends at {other}"
    return ""
