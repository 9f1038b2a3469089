"""PostgreSQL as its own user: a cluster on a file system, and libpq to talk to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests import ledger
from tests.blockdev import Lab, run, wait_until
from tests.ledger import SLOTS, WRITERS, Damaged, Found
from tests.needs import POSTGRES, postgres_programs

# The folder of the clone may be closed to this user.
AS_POSTGRES = (
    *("env", "--chdir=/"),
    *("setpriv", f"--reuid={POSTGRES}", f"--regid={POSTGRES}", "--clear-groups"),
)

# Small, so that pages and the log are written back and reused all the time. What makes a commit
# durable (fsync, synchronous_commit, full_page_writes) is on as it comes.
SETTINGS = """
listen_addresses = ''
max_connections = 10
shared_buffers = 1MB
min_wal_size = 2MB
max_wal_size = 4MB
checkpoint_timeout = 30s
bgwriter_delay = 10ms
autovacuum_naptime = 1s
"""


class Connection:
    """A connection through libpq. ConnectionError, or RuntimeError with what the server says."""

    _OK = (1, 2)  # PGRES_COMMAND_OK, PGRES_TUPLES_OK

    def __init__(self, socket: Path) -> None:
        self._pq = pq = ctypes.CDLL("libpq.so.5")
        pq.PQconnectdb.restype = pq.PQexec.restype = ctypes.c_void_p
        pq.PQgetvalue.restype = pq.PQerrorMessage.restype = ctypes.c_char_p
        wanted = f"host={socket} user={POSTGRES} dbname=postgres"
        self._connection = ctypes.c_void_p(pq.PQconnectdb(wanted.encode()))
        if pq.PQstatus(self._connection) != 0:  # CONNECTION_OK
            said = self._said()
            self.close()
            raise ConnectionError(said)

    def _said(self) -> str:
        said: bytes = self._pq.PQerrorMessage(self._connection)
        return said.decode()

    def execute(self, *statements: str) -> list[list[str]]:
        """The rows of the last statement."""
        pq = self._pq
        result = ctypes.c_void_p(pq.PQexec(self._connection, "; ".join(statements).encode()))
        try:
            if pq.PQresultStatus(result) not in self._OK:
                raise RuntimeError(self._said())
            columns = range(pq.PQnfields(result))
            return [
                [pq.PQgetvalue(result, row, column).decode() for column in columns]
                for row in range(pq.PQntuples(result))
            ]
        finally:
            pq.PQclear(result)

    def close(self) -> None:
        self._pq.PQfinish(self._connection)


class Writer:
    """The session of one writer of a ledger."""

    def __init__(self, socket: Path, writer: int) -> None:
        self._connection = Connection(socket)
        self._writer = writer
        # The server may still be at the last transaction of a writer that was killed.
        self._connection.execute(f"SELECT pg_advisory_lock({writer})")

    def last(self) -> int:
        ((last,),) = self._connection.execute(
            f"SELECT coalesce(max(number), 0) FROM entry WHERE writer = {self._writer}"
        )
        return int(last)

    def commit(self, number: int, seen: int, text: str) -> None:
        self._connection.execute(
            "BEGIN",
            f"INSERT INTO entry VALUES ({self._writer}, {number}, {seen}, '{text}')",
            f"UPDATE slot SET number = {number} "
            f"WHERE writer = {self._writer} AND slot = {number % SLOTS}",
            "COMMIT",
        )


class Postgres:
    module = "tests.postgres"

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._programs = postgres_programs()
        # The way to where the lab mounts leads through folders of root's.
        for folder in (lab.folder, lab.folder.parent):
            folder.chmod(0o711)

    def _program(self, name: str, *words: str | Path) -> list[str]:
        return [*AS_POSTGRES, str(self._programs / name), *(str(word) for word in words)]

    @contextlib.contextmanager
    def _running(self, data: Path) -> Iterator[Path]:
        """A server of this data until the end of the context; the folder of its socket."""
        socket, log = self._lab.name("socket"), self._lab.name("server-log")
        socket.mkdir(mode=0o700)
        shutil.chown(socket, POSTGRES, POSTGRES)
        command = self._program("postgres", "-D", data, "-k", socket)
        with log.open("xb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output)

        def answers() -> bool:
            if server.poll() is not None:
                raise Damaged(log.read_text(encoding="utf-8"))
            try:
                Connection(socket).close()
            except ConnectionError:
                return False
            return True

        try:
            wait_until(answers, "an answer of PostgreSQL")
            yield socket
            server.send_signal(signal.SIGINT)  # fast: sessions are ended, then a checkpoint
            if server.wait(60) != 0:
                raise Damaged(log.read_text(encoding="utf-8"))
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGQUIT)  # its children end with it
                server.wait(60)

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[list[str]]:
        data = folder / "data"
        data.mkdir(mode=0o700)
        shutil.chown(data, POSTGRES, POSTGRES)
        words = ("--data-checksums", "--wal-segsize=1", "--auth=trust", "--no-locale")
        run(*self._program("initdb", "-D", data, f"--username={POSTGRES}", *words))
        with (data / "postgresql.conf").open("a", encoding="utf-8") as settings:
            settings.write(SETTINGS)
            settings.flush()
            os.fsync(settings.fileno())
        with self._running(data) as socket:
            with contextlib.closing(Connection(socket)) as connection:
                connection.execute(
                    "CREATE TABLE entry (writer int, number int, seen int, text text, "
                    "PRIMARY KEY (writer, number))",
                    "CREATE INDEX ON entry (text)",
                    "CREATE TABLE slot (writer int, slot int, number int, "
                    "PRIMARY KEY (writer, slot))",
                    f"INSERT INTO slot SELECT w, s, 0 FROM generate_series(0, {WRITERS - 1}) w, "
                    f"generate_series(0, {SLOTS - 1}) s",
                )
            yield [str(socket)]

    def recover(self, folder: Path) -> list[Found]:
        data = folder / "data"
        # It names the live server of the source, which a server on this data would not run beside.
        (data / "postmaster.pid").unlink(missing_ok=True)
        try:
            with self._running(data) as socket:
                checks = ("--all", "--install-missing", "--heapallindexed", "--parent-check")
                run(self._programs / "pg_amcheck", "-h", socket, "-U", POSTGRES, *checks)
                with contextlib.closing(Connection(socket)) as connection:
                    found = [self._found(connection, writer) for writer in range(WRITERS)]
            run(*self._program("pg_checksums", "--check", "-D", data))
        except (RuntimeError, subprocess.CalledProcessError) as error:
            raise Damaged(str(error)) from error
        return found

    def _found(self, connection: Connection, writer: int) -> Found:
        entries = connection.execute(
            f"SELECT number, seen, text FROM entry WHERE writer = {writer} ORDER BY number"
        )
        slots = connection.execute(f"SELECT slot, number FROM slot WHERE writer = {writer}")
        return Found(
            [(int(number), int(seen), text) for number, seen, text in entries],
            {int(slot): int(number) for slot, number in slots},
        )


if __name__ == "__main__":
    socket, writer = sys.argv[1:3]
    ledger.work(Writer(Path(socket), int(writer)), *sys.argv[2:])
