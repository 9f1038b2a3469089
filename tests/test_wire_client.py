"""The source's side of a connection against keepers that fail, lie, flood or fall silent."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest

from blktrack.errors import BlktrackError, Busy, CopyFailed, Refused
from blktrack.linux import Buffer
from blktrack.ship.address import Address
from blktrack.ship.diagnosis import ConnectionFailed
from blktrack.ship.fields import Fields
from blktrack.ship.plan import Piece
from blktrack.ship.remote import client as module
from blktrack.ship.remote.client import Client
from blktrack.ship.remote.connect import Link
from blktrack.ship.remote.end import FarEnd
from blktrack.ship.remote.wire import Wire
from blktrack.ship.wire.channel import Channel
from blktrack.ship.wire.errors import ConnectionLost, NoKeeper, ProtocolError
from blktrack.ship.wire.message import Kind, Message, pack
from tests import handmade as made
from tests.farside import pipe
from tests.test_wire_channel import beside, is_full, until

KEY = bytes(32)


class Told:
    """An Observer that remembers, and may take its time."""

    def __init__(self) -> None:
        self.words: list[object] = []
        self.wait: Callable[[], object] = lambda: None

    def phase(self, name: str, total: int) -> None:
        self.words.append((name, total))

    def done(self, count: int) -> None:
        self.words.append(count)
        self.wait()

    def warn(self, message: str) -> None:
        self.words.append(message)


class Far:
    """A client, and the raw ends of the keeper that it speaks to."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        (near_in, far_out), (far_in, near_out) = os.pipe(), os.pipe()
        self.takes = held.enter_context(FileIO(far_in, "rb"))
        self.says = held.enter_context(FileIO(far_out, "wb"))
        source = held.enter_context(FileIO(near_in, "rb"))
        sink = held.enter_context(FileIO(near_out, "wb"))
        self.stop = threading.Event()
        self.explained: list[ConnectionLost] = []
        self.channel = Channel(source, sink, peer="vault", patience=60.0, stop=self.stop)
        self.client = Client(self.channel, self.stop, self.explain)
        held.callback(self.client.close, lambda: None)
        self.hears = Channel(self.takes, FileIO(os.dup(self.says.fileno()), "wb"), peer="",
                             patience=60.0)  # fmt: skip
        held.callback(self.hears.fail, ConnectionLost("", "the test is over"))

    def explain(self, error: ConnectionLost) -> Exception:
        self.explained.append(error)
        return ConnectionFailed("vault was switched off", retriable=True)

    def hear(self) -> Message:
        """The next message but beats."""
        while (message := self.hears.receive()).kind is Kind.PING:
            pass
        return message

    def say(self, *messages: bytes) -> None:
        for message in messages:
            view = memoryview(message)
            while view:
                view = view[self.says.write(view) or 0 :]

    @contextlib.contextmanager
    def asked(self, kind: Kind = Kind.ROOM) -> Iterator[Callable[[], BaseException | None]]:
        """Around what happens while a request waits; what is given waits for its end."""
        with beside(lambda: self.client.request(kind, {"a": 1})) as ended:
            assert self.hear().json() == b'{"a":1}'
            yield ended


@pytest.fixture
def far() -> Iterator[Far]:
    with contextlib.ExitStack() as held:
        yield Far(held)


def failed(**other: object) -> bytes:
    value = {"message": "because", "hint": "so", "exit": 1, "kinds": ["BlktrackError"], **other}
    return made.spoken(made.FAILED, 0, value)


def test_an_answer_and_words_before_it(far: Far) -> None:
    told, found = Told(), list[Fields]()
    # Before it was asked for: nobody waits.
    early = made.message(made.ALIVE) + made.spoken(made.DONE, 1, {"size": 9})
    far.say(early)
    until(lambda: far.channel.received == len(early), "it does not come")
    with beside(lambda: found.append(far.client.request(Kind.ROOM, {}, observer=told))) as ended:
        assert far.hear().request == 1
        far.say(
            made.spoken(made.PROGRESS, 1, {"phase": "applying", "total": 10}),
            made.spoken(made.PROGRESS, 1, {"done": 5}),
            made.spoken(made.PROGRESS, 1, {"warn": "slow disk"}),
            made.spoken(made.PROGRESS, 1, {"of": "tomorrow"}),
            made.spoken(made.PROGRESS, 2, {"done": 6}),
            made.spoken(made.DONE, 1, {"size": 7}),
            made.spoken(made.DONE, 1, {"size": 8}),
        )
        assert ended() is None
    assert told.words == [("applying", 10), 5, "vault: slow disk"]
    assert found[0].number("size") == 7


def test_requests_of_many_threads(far: Far) -> None:
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            ask = lambda: found.append(far.client.request(Kind.ROOM, {}).number("size"))  # noqa: E731
            stack.enter_context(beside(ask))
        numbers = [far.hear().request for _ in range(5)]
        for number in reversed(numbers):
            far.say(made.spoken(made.DONE, number, {"size": number}))
    assert sorted(found) == sorted(numbers) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("kinds", "cls", "code"),
    [
        (["Busy", "BlktrackError"], Busy, 6),
        (["Refused", "BlktrackError"], Refused, 1),
        (["TooMuchStaged", "CopyFailed", "BlktrackError"], CopyFailed, 1),
        (["KeyError", "OfTomorrow"], BlktrackError, 9),
        ([], BlktrackError, 1),
        ("Busy", BlktrackError, 1),
        ([["Busy"], {}], BlktrackError, 1),
    ],
)
def test_a_failure_is_raised_as_it_was_there(far: Far, kinds: object, cls: type, code: int) -> None:
    with far.asked() as first, far.asked() as second:
        far.say(failed(kinds=kinds, exit=code))
        errors = [first(), second()]
    for error in errors:
        assert type(error) is cls and isinstance(error, BlktrackError)
        assert (str(error), error.hint, error.exit_code) == ("vault: because", "so", code)
    with pytest.raises(cls, match="vault: because"):
        far.client.tell(pack(Kind.ZERO, rows=[(0, 1)]))
    with pytest.raises(cls, match="vault: because"):
        far.client.request(Kind.ROOM, {})
    assert not far.explained


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (failed(exit=0), "its error has a bad 'exit'"),
        (failed(exit=256), "its error has a bad 'exit'"),
        (failed(message="\x1b[2J"), "its error has a bad 'message'"),
        (made.spoken(made.FAILED, 0, {}), "its error has no 'kinds'"),
        (made.message(made.DONE, 1, data=b"{"), "its answer is not a JSON object"),
        (made.message(made.DIGESTS, 1), "it answers ROOM by DIGESTS"),
        (made.spoken(made.OPEN, 1, {}), "it answers ROOM by OPEN"),
        (made.spoken(made.PROGRESS, 1, {"done": -1}), "its progress has a bad 'done'"),
        (made.spoken(made.PROGRESS, 1, {"phase": "x"}), "its progress has no 'total'"),
        (b"Killed\n" * 9, "the head of a message does not match its checksum"),
    ],
)
def test_a_keeper_that_says_what_it_may_not(far: Far, said: bytes, why: str) -> None:
    with far.asked() as ended:
        far.say(said)
        error = ended()
    assert isinstance(error, ProtocolError)
    assert "vault breaks the protocol" in str(error) and why in str(error)


def test_the_reason_counts_and_not_the_broken_pipe(far: Far) -> None:
    """The keeper ends while it is sent to; what it said before is still on its way."""
    block = pack(Kind.WRITE, rows=[(0, 1 << 20)], data=[bytes(1 << 20)])

    def send() -> None:
        while True:
            far.client.tell(block)

    with beside(send) as ended:
        until(is_full(far.takes), "the pipe never was full")
        far.hears.fail(ConnectionLost("", "it is gone"))
        far.takes.close()
        time.sleep(0.5)  # the writer has met it
        far.say(failed(message="no room"))
        error = ended()
    assert type(error) is BlktrackError and str(error) == "vault: no room"


def test_an_end_is_explained(far: Far) -> None:
    with far.asked() as ended:
        far.hears._sink.close()  # type: ignore[attr-defined]
        far.says.close()
        error = ended()
    assert isinstance(error, ConnectionFailed) and "switched off" in str(error)
    assert [str(one) for one in far.explained] == ["the connection to vault was lost: it ended"]
    with pytest.raises(ConnectionFailed):
        far.client.request(Kind.ROOM, {})


def test_whoever_waits_where_it_is_closed_is_told(far: Far) -> None:
    with far.asked() as ended:
        far.client.close(lambda: None)
        assert isinstance(ended(), ConnectionLost)
    assert not far.explained


def test_a_flood_of_progress_is_bounded(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TOLD", 10)
    told, go_on = Told(), threading.Event()
    told.wait = lambda: go_on.wait(60)
    word = made.spoken(made.PROGRESS, 1, {"done": 1})
    with beside(lambda: far.client.request(Kind.ROOM, {}, observer=told)) as ended:
        assert far.hear().request == 1
        stream = word * 5000 + made.spoken(made.DONE, 1, {})
        far.say(stream)
        until(lambda: far.channel.received == len(stream), "it does not come")
        go_on.set()
        assert ended() is None
    assert len(told.words) < 15


def test_a_run_that_ends_waits_a_little(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.1)
    with far.asked() as ended:
        far.stop.set()
        error = ended()
    assert isinstance(error, ConnectionLost) and "it was given up" in str(error)


def test_what_lasts_is_not_waited_for(far: Far) -> None:
    with beside(lambda: far.client.request(Kind.COMMIT, {}, lasting=True)) as ended:
        far.hear()
        far.stop.set()
        assert isinstance(ended(), ConnectionLost)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (made.message(made.DIGESTS, 1, data=b"\5\0\0\0"), "a unit that was not asked for"),
        (made.message(made.DIGESTS, 1, data=b"\0\0\0\0"), "too few digests"),
        (made.spoken(made.DONE, 1, {}), "DONE"),
    ],
)
def test_comparisons_that_are_answered_wrongly(far: Far, answer: bytes, why: str) -> None:
    end = FarEnd("ssh://vault/x", 1 << 20, far.client, KEY, Wire())
    buffer = Buffer(8192)

    def look() -> None:
        end.differences([Piece(0, 8192, 0)], buffer, buffer, None, 4096)

    with beside(look) as ended:
        assert far.hear().kind is Kind.COMPARE
        far.say(answer)
        error = ended()
    assert isinstance(error, ProtocolError)
    assert f"it answers a comparison by {why}" in str(error)


def test_nothing_of_it_is_read(far: Far) -> None:
    with pytest.raises(CopyFailed, match="cannot read ssh://vault/x"):
        FarEnd("ssh://vault/x", 1 << 20, far.client, KEY, Wire()).read(0, 1)


# From the first byte on: what stands in for ssh is a script.


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "ssh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("BLKTRACK_SSH", str(path))


def link(stop: threading.Event | None = None) -> Link:
    return Link(Address.parse("ssh://vault/x"), Wire(), stop or threading.Event())


@pytest.mark.parametrize(
    ("script", "error", "why"),
    [
        (
            "echo Hello; echo This service allows sftp connections only.; exit 1",
            NoKeeper,
            "it says 'This service allows sftp connections only.' instead of starting",
        ),
        ("echo Hello; exec cat >/dev/null", NoKeeper, "it says 'Hello' instead"),
        ("echo Hello; echo sh: blktrack: not found >&2; exit 127", ConnectionFailed, "no blktrack"),
        ("echo Hello; echo Connection reset >&2; exit 255", ConnectionFailed, "Connection reset"),
        ("exit 255", ConnectionFailed, "cannot connect to vault"),
    ],
)
def test_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type, why: str
) -> None:
    monkeypatch.setattr("blktrack.ship.remote.connect.CONNECT", 1.0)
    stand_in(tmp_path, monkeypatch, script)
    with pytest.raises(error, match=why):
        link()


def test_connecting_is_given_up_where_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that does not answer: nobody is to wait for its time limit."""
    stand_in(tmp_path, monkeypatch, f"touch {tmp_path}/begun; exec sleep 1000")
    stop = threading.Event()
    with beside(lambda: link(stop)) as ended:
        until((tmp_path / "begun").exists, "it never began")
        stop.set()
        error = ended()
    assert isinstance(error, ConnectionLost) and "it was given up" in str(error)


def test_connections_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file and no thread, whether they came to something or not."""

    def left() -> tuple[int, list[str]]:
        gc.collect()  # files of earlier tests that wait for it would be missed in the second count
        names = [one.name for one in threading.enumerate()]
        return len(os.listdir("/proc/self/fd")), [name for name in names if name in _THREADS]

    def connect() -> None:
        stand_in(tmp_path, monkeypatch, "exit 255")
        with pytest.raises(ConnectionFailed):
            link()
        monkeypatch.setenv("BLKTRACK_SSH", pipe(tmp_path))
        with link() as found, pytest.raises(BlktrackError, match="it flushes before"):
            found.client.request(Kind.FLUSH, {})
        with link() as found, pytest.raises(BlktrackError, match="it seals no stage"):
            found.client.request(Kind.SEAL, {})

    connect()
    until(lambda: not left()[1], "a thread goes on")
    before = left()
    for _ in range(3):
        connect()
    until(lambda: not left()[1], "a thread goes on")
    assert left() == before


_THREADS = ("beat", "answers", "ssh-stderr")
