"""A real keeper, `blktrack recv --serve`, at the other end of two pipes, and what a source says to
it by hand."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import handmade as made
from tests.blockdev import TOP

SIZE = 1 << 20
UNIT = 64 << 10
KEY = bytes(range(32))
LINK = "0f8fad5b-d9cb-469f-a165-70867728950e"
SECONDS = 60.0  # within which a keeper ends: a deadline, never a pause
HELLO = b"blktrack-sync protocol=1 version=0 patience=60\n"

Row = tuple[int, int]


def point(epoch: int) -> dict[str, object]:
    return {"epoch": epoch, "generation": "g1", "time": 1700000000.5, "consistency": "crash"}


@dataclass
class End:
    """How a keeper ended."""

    code: int
    said: list[tuple[int, int, bytes]]  # kind, request, data
    err: str

    @property
    def failed(self) -> dict[str, Any]:
        """What the source was told of the failure: the last message, but for beats."""
        kinds = [one for one in self.said if one[0] != made.ALIVE]
        assert kinds and kinds[-1][0] == made.FAILED, self
        value: dict[str, Any] = json.loads(kinds[-1][2])
        return value

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(data) for kind, _, data in self.said if kind == made.DONE]

    def assert_clean(self) -> None:
        assert "Traceback" not in self.err, self.err
        assert "Exception" not in self.err, self.err


class Keeper:
    """One process. A context manager: it never outlives the test."""

    def __init__(
        self,
        root: Path,
        *options: str,
        hello: bytes | None = HELLO,
        deaf: bool = False,
        crash: str = "",
    ) -> None:
        """deaf -- of what it says nothing but its first line is taken. crash -- where it dies."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blktrack", "recv", *(options or ("--serve",))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=TOP,
            env={**os.environ, "BLKTRACK_ROOT": str(root), "BLKTRACK_CRASH": crash},
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._out, self._err = bytearray(), bytearray()
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=[file, into], daemon=True)
            for file, into in ((self.stdout, self._out), (self.process.stderr, self._err))
            if not deaf or file is not self.stdout
        ]
        while deaf and not self._out.endswith(b"\n"):
            self._out += self.stdout.read(1)
        for reader in self._readers:
            reader.start()
        self.line = b""
        if hello is not None:
            self.line = self.take_line()
            self.send(hello)

    def _read(self, file: Any, into: bytearray) -> None:
        while data := file.read(1 << 16):
            with self._changed:
                into += data
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def take_line(self) -> bytes:
        with self._changed:
            found = self._changed.wait_for(lambda: b"\n" in self._out, SECONDS)
            assert found, self._err
            at = self._out.index(b"\n") + 1
            line = bytes(self._out[:at])
            del self._out[:at]
        return line

    def send(self, *messages: bytes) -> bool:
        """Whether all of it was taken; what is not any more is not sent."""
        for data in messages:
            view = memoryview(data)
            while view:
                try:
                    view = view[self.stdin.write(view) or 0 :]
                except BrokenPipeError:
                    return False
        return True

    def answer(self, request: int) -> bytes:
        """Wait for the answer to a request; its data."""
        return self._wait_for((made.DONE, made.DIGESTS), request)

    def fails(self) -> None:
        """Wait for the word that it fails."""
        self._wait_for((made.FAILED,), None)

    def _wait_for(self, kinds: tuple[int, ...], request: int | None) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._found(kinds, request) is not None, SECONDS)
            found = self._found(kinds, request)
            assert found is not None, (bytes(self._out[:300]), bytes(self._err))
        return found

    def _found(self, kinds: tuple[int, ...], request: int | None) -> bytes | None:
        out, at = bytes(self._out), 0
        while at + made.HEAD_SIZE <= len(out):
            kind, _, _, number, stored, *_ = struct.unpack_from(made.HEAD, out, at)
            at += made.HEAD_SIZE + stored
            if at <= len(out) and kind in kinds and request in (None, number):
                return out[at - stored : at]
        return None

    def end(self) -> End:
        """End what is sent, and wait for it to end."""
        with contextlib.suppress(OSError):
            self.stdin.close()
        return self.ended()

    def ended(self) -> End:
        """Wait for it to end by itself."""
        code = self.process.wait(SECONDS)
        for reader in self._readers:
            reader.join(SECONDS)
        return End(code, list(made.parsed(bytes(self._out))), self._err.decode())

    def kill(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with contextlib.suppress(OSError):
            self.stdin.close()
        self.process.wait()
        for reader in self._readers:
            reader.join(SECONDS)
        for file in (self.stdout, self.process.stderr):
            assert file is not None
            file.close()


def words(target: Path | str, **other: object) -> dict[str, object]:
    """Of OPEN."""
    source = {"device": "/dev/vdb", "name": "serial:b1", "size": SIZE, "host": "far"}
    return {
        "target": str(target),
        "source": source,
        "link": LINK,
        "force": False,
        "writable": True,
        "key": KEY.hex(),
        "boot": "elsewhere",
        "major": 8,
        "minor": 0,
        **other,
    }


def open_(target: Path | str, **other: object) -> bytes:
    return made.spoken(made.OPEN, 1, words(target, **other))


def ask(kind: int, request: int, **value: object) -> bytes:
    return made.spoken(kind, request, {"size": SIZE, **value})


def write(start: int, data: bytes) -> bytes:
    return made.message(made.WRITE, 0, [(start, len(data))], data)


def zero(*rows: Row) -> bytes:
    return made.message(made.ZERO, 0, rows)


def begin(request: int, state: str = "unfinished") -> bytes:
    return ask(made.BEGIN, request, state=state, generation="g1")


def stage(request: int, resume: str = "") -> bytes:
    return ask(made.STAGE, request, resume=resume)


def commit(request: int, epoch: int) -> bytes:
    return ask(made.COMMIT, request, point=point(epoch))


def seal(request: int, epoch: int, rows: Sequence[Row]) -> bytes:
    """rows -- of all that is staged: sorted, those that meet joined."""
    digest = hashlib.blake2b(made.table(rows), digest_size=20).hexdigest()
    return ask(made.SEAL, request, extents=digest, point=point(epoch))


def compare(request: int, rows: Sequence[Row], data: Sequence[bytes], granularity: int) -> bytes:
    """Of what the source holds there; each row within one unit."""
    said = b"".join(digest(one) for one in data)
    return made.message(made.COMPARE, request, rows, struct.pack("<I", granularity) + said)


def digest(data: bytes) -> bytes:
    return hmac.digest(KEY, data, "sha256")[:16]


@dataclass
class Replica:
    """A replica, and keepers of it."""

    root: Path
    target: Path
    image: bytearray = field(default_factory=lambda: bytearray(SIZE))  # what it should hold
    options: tuple[str, ...] = ()

    def keeper(self, *, hello: bytes | None = HELLO, crash: str = "") -> Keeper:
        return Keeper(self.root, *self.options, hello=hello, crash=crash)

    def make(self) -> None:
        """It is at point 7."""
        self.image[:] = os.urandom(1 << 12) * (SIZE >> 12)
        with self.keeper() as keeper:
            keeper.send(open_(self.target), begin(2), write(0, bytes(self.image)), commit(3, 7))
            end = keeper.end()
        assert end.code == 0 and len(end.answers()) == 3, end

    @property
    def folder(self) -> Path:
        return Path(f"{self.target}.blktrack")

    @property
    def record(self) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = json.loads((self.folder / "replica.json").read_text())
        except FileNotFoundError:
            return None
        return value

    @property
    def content(self) -> bytes:
        return self.target.read_bytes()

    def assert_at(self, epoch: int) -> None:
        record = self.record
        assert record is not None and record["state"] == "ready", record
        assert record["point"]["epoch"] == epoch
        assert self.content == self.image

    def told(self, *messages: bytes) -> End:
        """What a keeper comes to that is told all of these, of which one ends it."""
        with self.keeper() as keeper:
            keeper.send(*messages)
            keeper.fails()
            end = keeper.end()
        end.assert_clean()
        return end


def made_in(folder: Path) -> Replica:
    """One that is at point 7."""
    found = Replica(folder / "root", folder / "replica.img")
    found.make()
    return found


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    return made_in(tmp_path)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Replica:
    """One for all tests that must leave it as it is."""
    return made_in(tmp_path_factory.mktemp("untouched"))
