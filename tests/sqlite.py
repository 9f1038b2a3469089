"""SQLite on a file system of its own, a database for each writer of a ledger."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

from tests import ledger
from tests.ledger import SLOTS, WRITERS, Damaged, Found

# With a rollback journal a commit is the unlinking of the journal, which only EXTRA makes durable.
SYNCHRONOUS = {"wal": "full", "delete": "extra"}


class Database:
    """A connection to the database of one writer."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.execute = connection.execute

    def create(self) -> None:
        self.execute("CREATE TABLE entry (number INTEGER PRIMARY KEY, seen INTEGER, text TEXT)")
        self.execute("CREATE INDEX by_text ON entry (text)")
        self.execute("CREATE TABLE slot (slot INTEGER PRIMARY KEY, number INTEGER)")
        slots = [(slot,) for slot in range(SLOTS)]
        self._connection.executemany("INSERT INTO slot VALUES (?, 0)", slots)

    def last(self) -> int:
        return int(self.execute("SELECT coalesce(max(number), 0) FROM entry").fetchone()[0])

    def commit(self, number: int, seen: int, text: str) -> None:
        self.execute("BEGIN IMMEDIATE")
        self.execute("INSERT INTO entry VALUES (?, ?, ?)", (number, seen, text))
        self.execute("UPDATE slot SET number = ? WHERE slot = ?", (number, number % SLOTS))
        self.execute("COMMIT")

    def found(self) -> Found:
        entries = self.execute("SELECT number, seen, text FROM entry ORDER BY number").fetchall()
        return Found(entries, dict(self.execute("SELECT slot, number FROM slot")))


@contextlib.contextmanager
def opened(folder: Path, writer: int, journal: str) -> Iterator[Database]:
    path = folder / f"ledger{writer}.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (now,) = connection.execute(f"PRAGMA journal_mode = {journal}").fetchone()
        assert now == journal
        connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS[journal]}")
        # So few pages that the database itself is written all the time.
        connection.execute("PRAGMA wal_autocheckpoint = 30")
        yield Database(connection)


class Sqlite:
    module = "tests.sqlite"

    def __init__(self, journal: str) -> None:
        self.journal = journal

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[list[str]]:
        for writer in range(WRITERS):
            with opened(folder, writer, self.journal) as database:
                database.create()
        yield [str(folder), self.journal]

    def recover(self, folder: Path) -> list[Found]:
        found = []
        for writer in range(WRITERS):
            try:
                with opened(folder, writer, self.journal) as database:
                    (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
                    if verdict != "ok":
                        raise Damaged(verdict)
                    found.append(database.found())
            except sqlite3.Error as error:
                raise Damaged(str(error)) from error
        return found


if __name__ == "__main__":
    folder, journal, writer = sys.argv[1:4]
    with opened(Path(folder), int(writer), journal) as database:
        ledger.work(database, *sys.argv[3:])
