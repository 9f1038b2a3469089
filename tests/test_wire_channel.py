"""Both directions of a connection over real pipes: whole messages, silence, ends, and no waiting
for what never comes."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import random
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO

import pytest

from blktrack.errors import Refused
from blktrack.rates import Rates
from blktrack.ship.limit import Throttle
from blktrack.ship.wire.channel import Channel
from blktrack.ship.wire.errors import ConnectionLost, ProtocolError
from blktrack.ship.wire.inbox import Inbox
from blktrack.ship.wire.message import Kind, Message, pack, pack_json
from tests import handmade as made

PATIENCE = 1.0
DEADLINE = 30.0  # for whatever happens in another thread: never a pause
BLOCK = 4 << 20


class Ends:
    """The raw ends of a connection, and channels over them."""

    def __init__(self, held: contextlib.ExitStack, *, sockets: bool = False) -> None:
        self.held = held
        if sockets:
            near, far = socket.socketpair()
            pairs = [(near.fileno(), near), (far.fileno(), far)]
            fds = [os.dup(fd) for fd, _ in pairs for _ in range(2)]
            near.close()
            far.close()
            near_in, near_out, far_in, far_out = fds
        else:
            (near_in, far_out), (far_in, near_out) = os.pipe(), os.pipe()
        self.near_in, self.near_out = self.file(near_in, "rb"), self.file(near_out, "wb")
        self.far_in, self.far_out = self.file(far_in, "rb"), self.file(far_out, "wb")

    def file(self, fd: int, mode: str) -> FileIO:
        return self.held.enter_context(FileIO(fd, mode))

    def near(self, **options: object) -> Channel:
        return self._channel(self.near_in, self.near_out, "far", options)

    def far(self, **options: object) -> Channel:
        return self._channel(self.far_in, self.far_out, "near", options)

    def _channel(
        self, source: FileIO, sink: FileIO, peer: str, options: dict[str, object]
    ) -> Channel:
        words = {"patience": DEADLINE, **options}
        channel = Channel(source, sink, peer=peer, **words)  # type: ignore[arg-type]
        self.held.callback(channel.fail, ConnectionLost(peer, "the test is over"))
        return channel


@pytest.fixture
def ends() -> Iterator[Ends]:
    with contextlib.ExitStack() as held:
        yield Ends(held)


@contextlib.contextmanager
def beside(work: Callable[[], object]) -> Iterator[Callable[[], BaseException | None]]:
    """Runs it in a thread; called, waits for its end and gives what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> BaseException | None:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "it never ended"
        return raised[0] if raised else None

    yield end
    end()


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def readable(file: FileIO) -> int:
    """Bytes that wait in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(file.fileno(), termios.FIONREAD, count)
    return count[0]


def fill_pipe(channel: Channel) -> Callable[[], None]:
    def send() -> None:
        while True:
            channel.send(pack(Kind.WRITE, rows=[(0, BLOCK)], data=[bytes(BLOCK)]))

    return send


def is_full(file: FileIO) -> Callable[[], bool]:
    return lambda: readable(file) >= 65536 - 4096


# Silence.


def test_a_dead_peer_is_noticed(ends: Ends) -> None:
    channel = ends.near(patience=PATIENCE)
    begun = time.monotonic()
    with pytest.raises(ConnectionLost) as caught:
        channel.receive()
    assert time.monotonic() - begun >= PATIENCE
    assert str(caught.value) == "the connection to far was lost: nothing was heard for 1 s"
    assert caught.value.silent


def test_a_peer_that_dies_within_a_message_is_noticed(ends: Ends) -> None:
    channel = ends.near(patience=PATIENCE)
    ends.far_out.write(made.message(made.DONE, 1, data=b"{}")[:-1])
    with pytest.raises(ConnectionLost, match="nothing was heard"):
        channel.receive()


def test_a_slow_peer_is_not_taken_for_dead(ends: Ends) -> None:
    """One byte per 0.3 of the patience: the message takes several times as long as that."""
    channel = ends.near(patience=2 * PATIENCE)
    stream = made.message(made.DONE, 7, data=b"{}")

    def trickle() -> None:
        ends.far_out.write(stream[:-10])
        for byte in stream[-10:]:
            time.sleep(0.6 * PATIENCE)  # it is the slow peer
            ends.far_out.write(bytes([byte]))

    with beside(trickle):
        got = channel.receive()
    assert (got.kind, got.request) == (Kind.DONE, 7)
    assert channel.received == len(stream)


def test_beats_keep_a_silent_side_alive(ends: Ends) -> None:
    near, far = ends.near(patience=2 * PATIENCE), ends.far(patience=PATIENCE)
    far.beat(Kind.ALIVE)
    begun = time.monotonic()
    while time.monotonic() < begun + 4 * PATIENCE:
        assert near.receive().kind is Kind.ALIVE
    far.close()
    with pytest.raises(ConnectionLost, match="nothing was heard"):
        while True:
            near.receive()


def test_silence_counts_only_while_listened_to(ends: Ends) -> None:
    """Who was busy for long takes what came meanwhile, and then waits as patiently as ever."""
    channel = ends.near(patience=2 * PATIENCE)
    ends.far_out.write(made.message(made.ALIVE))
    time.sleep(2.5 * PATIENCE)  # it is busy
    assert channel.receive().kind is Kind.ALIVE

    def later() -> None:
        time.sleep(0.5 * PATIENCE)
        ends.far_out.write(made.message(made.DONE))

    with beside(later):
        assert channel.receive().kind is Kind.DONE


# Sending.


def test_messages_of_many_threads_stay_whole(ends: Ends, seed: int) -> None:
    near, far = ends.near(), ends.far()
    near.beat(Kind.PING)
    threads, each = 8, 60

    def sender(own: int) -> Callable[[], None]:
        rng = random.Random(seed + own)

        def send() -> None:
            for turn in range(each):
                size = rng.choice([1, 10, 3000, 70_000, 200_000])
                body = bytes([own]) * size
                cut = rng.randrange(size + 1)
                now = rng.random() < 0.3
                rows = [(turn, size)]
                near.send(pack(Kind.WRITE, own, rows, [body[:cut], body[cut:]]), now=now)
            near.send(pack(Kind.FLUSH, own, data=[b"{}"]))

        return send

    with contextlib.ExitStack() as stack:
        results = [stack.enter_context(beside(sender(own))) for own in range(1, threads + 1)]
        turns = dict.fromkeys(range(1, threads + 1), 0)
        ended = 0
        while ended < threads:
            got = far.receive()
            if got.kind is Kind.PING:
                continue
            if got.kind is Kind.FLUSH:
                assert turns[got.request] == each
                ended += 1
                continue
            assert got.rows[0, 0] == turns[got.request], "in the order in which it sent them"
            assert bytes(got.data) == bytes([got.request]) * int(got.rows[0, 1])
            turns[got.request] += 1
        assert [end() for end in results] == [None] * threads
    near.close()
    with pytest.raises(ConnectionLost, match="it ended"):
        ends.near_out.close()
        while True:
            far.receive()
    assert near.sent == far.received


def test_small_messages_wait_for_each_other(ends: Ends) -> None:
    channel = ends.near()
    small = pack(Kind.WRITE, rows=[(0, 100)], data=[bytes(100)])
    size = sum(len(part) for part in small)
    for _ in range(3):
        channel.send(small, now=False)
    assert channel.sent == readable(ends.far_in) == 0
    channel.send(pack(Kind.FLUSH, 1, data=[b"{}"]))
    assert channel.sent == readable(ends.far_in) == 3 * size + 34
    with beside(lambda: os.read(ends.far_in.fileno(), 1 << 20)):
        pass
    count = 0
    with beside(lambda: [ends.far_in.read(1 << 20) for _ in range(2)]):
        while channel.sent == 3 * size + 34:
            channel.send(small, now=False)
            count += 1
        channel.send(small)
        channel.close()
        ends.near_out.close()
    assert abs(count * size - (64 << 10)) < 2 * size, "at once where they are many"


def test_a_beat_takes_what_waits_along(ends: Ends) -> None:
    near, far = ends.near(patience=PATIENCE), ends.far()
    near.send(pack(Kind.ZERO, rows=[(0, 512)]), now=False)
    near.beat(Kind.PING)
    assert [far.receive().kind for _ in range(2)] == [Kind.ZERO, Kind.PING]


def test_what_waits_is_passed_on_at_the_end(ends: Ends) -> None:
    near, far = ends.near(), ends.far()
    near.send(pack(Kind.ZERO, rows=[(0, 512)]), now=False)
    near.close()
    assert far.receive().kind is Kind.ZERO
    with pytest.raises(ConnectionLost, match="it was closed"):
        near.send(pack(Kind.PING))
    with pytest.raises(ConnectionLost, match="it was closed"):
        near.receive()


def test_a_large_part_keeps_its_place(ends: Ends) -> None:
    near, far = ends.near(), ends.far()
    with beside(
        lambda: (
            near.send(pack(Kind.ZERO, rows=[(0, 512)]), now=False),
            near.send(pack(Kind.WRITE, rows=[(0, BLOCK)], data=[bytes(BLOCK)]), now=False),
            near.send(pack(Kind.FLUSH, 1, data=[b"{}"])),
        )
    ):
        kinds = [far.receive().kind for _ in range(3)]
    assert kinds == [Kind.ZERO, Kind.WRITE, Kind.FLUSH]


def test_a_slow_pace_is_no_silence(ends: Ends) -> None:
    near = ends.near(patience=2 * PATIENCE, pace=Throttle(Rates(100_000)))
    far = ends.far(patience=2 * PATIENCE)
    size = 400_000  # twice the patience, under the lock that beats wait for
    with beside(lambda: near.send(pack(Kind.WRITE, rows=[(0, size)], data=[bytes(size)]))):
        assert len(far.receive().data) == size


def test_a_run_that_ends_keeps_no_pace(ends: Ends) -> None:
    stop = threading.Event()
    near, far = ends.near(pace=Throttle(Rates(1000)), stop=stop), ends.far()
    with beside(lambda: near.send(pack(Kind.WRITE, rows=[(0, BLOCK)], data=[bytes(BLOCK)]))):
        stop.set()
        assert len(far.receive().data) == BLOCK


# Ends.


def test_a_writer_is_released_where_it_fails(ends: Ends) -> None:
    channel = ends.near()
    why = Refused("because")
    with beside(fill_pipe(channel)) as ended:
        until(is_full(ends.far_in), "the pipe never was full")
        channel.fail(why)
        channel.fail(ConnectionLost("far", "later"))
        assert ended() is why
    with pytest.raises(Refused, match="because"):
        channel.send(pack(Kind.PING))
    channel.close()


def test_beats_end_without_a_word(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for the pipe meets why the channel failed, and has nobody to tell it to."""
    escaped: list[object] = []
    monkeypatch.setattr(threading, "excepthook", escaped.append)
    channel = ends.near(patience=PATIENCE / 2)
    begun = time.monotonic()
    channel.beat(Kind.PING)
    beat = [one for one in threading.enumerate() if one.name == "beat"][-1]
    with beside(fill_pipe(channel)):
        until(is_full(ends.far_in), "the pipe never was full")
        until(lambda: time.monotonic() > begun + PATIENCE, "time stands still")
        channel.fail(Refused("because"))
    beat.join(DEADLINE)
    assert not beat.is_alive()
    assert escaped == []


def test_who_closes_does_not_wait_for_who_takes_nothing(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blktrack.ship.wire.channel.LAST", 0.1)
    channel = ends.near()
    with beside(fill_pipe(channel)) as ended:
        until(is_full(ends.far_in), "the pipe never was full")
        with beside(channel.close) as closed:
            assert closed() is None
        error = ended()
    assert isinstance(error, ConnectionLost) and "it takes nothing" in str(error)


def test_a_run_that_ends_does_not_wait_for_who_takes_nothing(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blktrack.ship.wire.channel._GRACE", 0.1)
    stop = threading.Event()
    channel = ends.near(stop=stop)
    with beside(fill_pipe(channel)) as ended:
        until(is_full(ends.far_in), "the pipe never was full")
        stop.set()
        error = ended()
    assert isinstance(error, ConnectionLost) and "it takes nothing" in str(error)


@pytest.mark.parametrize("sockets", [False, True], ids=["pipes", "sockets"])
def test_the_end(sockets: bool) -> None:
    """As sshd gives it to a command: pipes, or one socket for both directions."""
    with contextlib.ExitStack() as held:
        ends = Ends(held, sockets=sockets)
        near, far = ends.near(), ends.far()
        with beside(lambda: near.send(pack(Kind.WRITE, rows=[(0, BLOCK)], data=[bytes(BLOCK)]))):
            assert len(far.receive().data) == BLOCK
        far.send(pack_json(Kind.FAILED, 0, {}))
        ends.far_in.close()
        ends.far_out.close()
        with pytest.raises(ConnectionLost) as caught:
            fill_pipe(near)()
        assert str(caught.value).endswith(("Broken pipe", "Connection reset by peer"))
        with pytest.raises(ConnectionLost):
            near.send(pack(Kind.PING))
        assert near.receive().kind is Kind.FAILED, "what was said before is heard all the same"
        with pytest.raises(ConnectionLost, match="it ended"):
            near.receive()


def test_what_comes_late_is_heard_after_a_broken_pipe(ends: Ends) -> None:
    """As through ssh, which may see the far command end before all of its words are here."""
    near = ends.near()
    ends.far_in.close()
    with pytest.raises(ConnectionLost, match="Broken pipe"):
        near.send(pack(Kind.PING))

    def later() -> None:
        time.sleep(0.7)  # longer than a look
        ends.far_out.write(made.spoken(made.FAILED, 0, {}))

    with beside(later):
        assert near.receive().kind is Kind.FAILED


def test_an_end_within_a_message(ends: Ends) -> None:
    channel = ends.near()
    ends.far_out.write(made.message(made.DONE, 1, data=b"{}")[:-1])
    ends.far_out.close()
    with pytest.raises(ConnectionLost, match="it ended"):
        channel.receive()


def test_what_is_no_message(ends: Ends) -> None:
    channel = ends.near()
    ends.far_out.write(b"Killed\n" * 9)
    with pytest.raises(ProtocolError) as caught:
        channel.receive()
    said = "far breaks the protocol: the head of a message does not match its checksum"
    assert str(caught.value) == said
    assert caught.value.hint == "use the same version of blktrack on both hosts"


def test_a_message_that_is_cut_off_is_the_last(ends: Ends) -> None:
    class Stuck:
        slice = 4096

        def wait(self, count: int, stop: threading.Event) -> bool:
            raise KeyboardInterrupt

    channel = ends.near(pace=Stuck())
    with pytest.raises(KeyboardInterrupt):
        channel.send(pack(Kind.PING))
    channel._pace = None
    with pytest.raises(ConnectionLost, match="a message was cut off"):
        channel.send(pack(Kind.PING))
    assert readable(ends.far_in) == 0


def test_a_source_that_its_owner_has_closed(ends: Ends) -> None:
    channel = ends.near()
    with beside(channel.receive) as ended:
        until(lambda: threading.active_count() > 1, "no thread")
        ends.near_in.close()
        ends.held.callback(os.close, os.open("/dev/zero", os.O_RDONLY))  # has its number now
        channel.close()
        assert isinstance(ended(), ConnectionLost)


# What the keeper has received.


def numbered(count: int, size: int = 0) -> bytes:
    rows = [(0, size)] if size else []
    kind = made.WRITE if size else made.FLUSH
    return b"".join(
        made.message(kind, index + 1, rows, bytes(size) if size else b"{}")
        for index in range(count)
    )


def taken(inbox: Inbox) -> list[Message]:
    found = []
    while message := inbox.take():
        found.append(message)
    return found


def test_what_came_before_the_end_is_taken(ends: Ends) -> None:
    ends.far_out.write(numbered(50) + made.message(made.PING) + numbered(1)[:-1])
    ends.far_out.close()
    inbox = Inbox(ends.near())
    until(lambda: inbox._ended, "the end is not noticed")
    assert [message.request for message in taken(inbox)] == list(range(1, 51))
    assert inbox.take() is None


def test_what_came_before_what_is_wrong_is_taken(ends: Ends) -> None:
    ends.far_out.write(numbered(3) + b"x" * 32)
    inbox = Inbox(ends.near())
    assert [inbox.take(), inbox.take(), inbox.take()] != [None] * 3
    for _ in range(2):
        with pytest.raises(ProtocolError, match="does not match its checksum"):
            inbox.take()


def test_an_inbox_is_bounded(ends: Ends) -> None:
    """A keeper that is slow slows the source down, and takes no more memory."""
    near, far = ends.near(), ends.far()
    count, size = 40, 1 << 20
    block = pack(Kind.WRITE, 1, [(0, size)], [bytes(size)])
    inbox = Inbox(near)
    with beside(lambda: [far.send(block) for _ in range(count)]):
        before = -1
        while near.received != before:  # until nothing goes on any more
            before = near.received
            time.sleep(0.5)
        assert 16 * size < near.received < (16 + 3) * size
        assert is_full(ends.near_in)()
        for _ in range(count):
            message = inbox.take()
            assert message is not None and len(message.data) == size
            assert inbox._bytes <= (16 + 2) * size
    ends.far_out.close()
    assert inbox.take() is None
    assert inbox._bytes == 0


def test_what_is_dropped_frees_who_sends(ends: Ends) -> None:
    near, far = ends.near(), ends.far()
    size = 1 << 20
    block = pack(Kind.WRITE, 1, [(0, size)], [bytes(size)])
    inbox = Inbox(near)

    def send() -> None:
        for _ in range(60):
            far.send(block)
        ends.far_out.close()

    with beside(send) as ended:
        until(is_full(ends.near_in), "the pipe never was full")
        inbox.drop(DEADLINE)
        assert ended() is None
    assert inbox.take() is None


def test_dropping_ends(ends: Ends) -> None:
    near = ends.near()
    inbox = Inbox(near)
    begun = time.monotonic()
    inbox.drop(0.2)
    assert time.monotonic() - begun >= 0.2


def test_a_source_that_is_silent_holds_nobody_up(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper is about to answer, and its pipe is full: nobody is there to take it."""
    monkeypatch.setattr("blktrack.ship.wire.inbox.LAST", 0.1)
    near = ends.near(patience=PATIENCE)
    with beside(fill_pipe(near)) as ended:
        until(is_full(ends.far_in), "the pipe never was full")
        inbox = Inbox(near)
        assert inbox.take() is None
        assert isinstance(ended(), ConnectionLost)


def test_what_fails_otherwise_is_raised_where_it_is_taken(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Message:
        raise MemoryError("none left")

    near = ends.near()
    monkeypatch.setattr(near, "receive", fail)
    with pytest.raises(MemoryError, match="none left"):
        Inbox(near).take()
