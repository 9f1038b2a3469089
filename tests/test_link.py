"""A link that tests bend and break keeps to its shape, and breaks where it is told to."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.blockdev import told, wait_until
from tests.lane import Lane, Shape
from tests.link import Link
from tests.netlab import NetLab
from tests.netns import FAR, Host, pair
from tests.shaper import SOCKET_BUFFER

# Bytes that the kernel may hold at both ends of a relayed connection: it doubles what it is told.
KERNEL = 2 * 2 * SOCKET_BUFFER


def sent_in(lane: Lane, seconds: float, chunk: int = 10_000) -> int:
    """Bytes through the lane within that time, by a clock of the test's own, if all want to go."""
    sent = 0
    while lane.arrival(chunk, 0.0) < seconds:
        sent += chunk
    return sent


def test_a_lane_keeps_its_rate(seed: int) -> None:
    lane = Lane(Shape(), random.Random(seed))
    assert lane.arrival(10**9, 5.0) == 5.0
    lane.set(Shape(rate=1e6), 0.0)
    assert sent_in(lane, 100) == pytest.approx(100e6, rel=1e-3)
    lane.set(Shape(rate=1e6, delay=0.5), 0.0)
    assert lane.arrival(1000, 1.0) == pytest.approx(1.501)
    assert lane.arrival(1000, 1.0) == pytest.approx(1.502)  # behind the other
    assert lane.arrival(1000, 9.0) == pytest.approx(9.501)  # what was not used is lost
    assert sent_in(Lane(Shape(rate=1e6, delay=50), random.Random(seed)), 100) == pytest.approx(
        50e6, rel=1e-3
    )


def test_a_lane_pauses_as_often_as_it_is_told(seed: int) -> None:
    shape = Shape(rate=1e6, stalls=2, stall=0.25)
    assert shape.usable == pytest.approx(1e6 / 1.5)
    lane = Lane(Shape(), random.Random(seed))
    lane.set(shape, 0.0)
    assert sent_in(lane, 4_000) == pytest.approx(4_000 * shape.usable, rel=0.08)
    lane.set(shape, 0.0)
    late = [lane.arrival(0, now / 100) - now / 100 for now in range(200_000)]
    assert max(late) <= 0.25
    assert sum(1 for each in late if each) == pytest.approx(200_000 / 3, rel=0.1)


class Ends:
    """A link between a near socket and a far one, both of this process."""

    def __init__(self, near: Host, far: Host, held: contextlib.ExitStack, seed: int) -> None:
        self.near, self._held = near, held
        with far.inside():
            self.server = held.enter_context(socket.create_server((FAR, 0)))
        self.link = Link(near, self.server.getsockname(), seed)

    def dial(self) -> socket.socket:
        with self.near.inside():
            made = socket.create_connection((self.link.host, self.link.port), timeout=30)
        return self._held.enter_context(made)

    def connect(self) -> tuple[socket.socket, socket.socket]:
        made = self.dial()
        other, _ = self.server.accept()
        other.settimeout(30)
        return made, self._held.enter_context(other)


@pytest.fixture
def ends(seed: int) -> Iterator[Ends]:
    with pair() as (near, far, _), contextlib.ExitStack() as held:
        yield Ends(near, far, held, seed)


def read(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := source.recv(count - len(data))):
        data += more
    return data


def drain(source: socket.socket) -> int:
    """All that comes until its end."""
    found, buffer = 0, bytearray(1 << 20)
    while count := source.recv_into(buffer):
        found += count
    return found


def is_silent(source: socket.socket) -> bool:
    return not select.select([source], [], [], 0.1)[0]


def seconds_for(ends: Ends, count: int) -> float:
    near, far = ends.connect()
    data = bytes(1 << 20)

    def send() -> None:
        for at in range(0, count, len(data)):
            near.sendall(data[: count - at])
        near.shutdown(socket.SHUT_WR)

    start = time.monotonic()
    sender = threading.Thread(target=send)
    sender.start()
    assert drain(far) == count
    sender.join()
    return time.monotonic() - start


@pytest.mark.needs("netns")
def test_bytes_arrive_as_they_were_sent_and_are_counted(ends: Ends) -> None:
    ends.link.shape(Shape(rate=50e6, delay=0.01, buffer=100_000))
    pairs = [ends.connect() for _ in range(3)]
    data = [os.urandom(1_000_000 + at) for at in range(3)]
    for (near, _), each in zip(pairs, data, strict=True):
        threading.Thread(target=near.sendall, args=(each,), daemon=True).start()
    for (near, far), each in zip(pairs, data, strict=True):
        assert read(far, len(each)) == each
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        far.sendall(b"thanks")  # half of it is still open
        far.close()
        assert read(near, 7) == b"thanks"
    wait_until(lambda: ends.link.counts().open == 0, "the end of all connections")
    counts = ends.link.counts()
    assert counts.up.taken == counts.up.passed == sum(map(len, data))
    assert counts.down.passed == 18
    assert counts.accepted == 3


@pytest.mark.needs("netns")
def test_rate_and_delay_of_a_real_link(ends: Ends) -> None:
    fast = seconds_for(ends, 200_000_000)
    ends.link.shape(Shape(rate=10e6))
    narrow = seconds_for(ends, 20_000_000)
    # Not faster: how much slower than it should this machine is, is not the link's.
    assert narrow > 1.99
    told(f"a link relays {200 / fast:.0f} MB/s; told 10 MB/s, {20 / narrow:.3f} MB/s")
    ends.link.shape(Shape(delay=0.1))
    near, far = ends.connect()
    start = time.monotonic()
    near.sendall(b"ping")
    assert read(far, 4) == b"ping"
    assert time.monotonic() - start >= 0.1
    far.sendall(b"pong")
    assert read(near, 4) == b"pong"
    assert time.monotonic() - start >= 0.2


@pytest.mark.needs("netns")
def test_who_sends_too_fast_is_held_up(ends: Ends) -> None:
    ends.link.shape(Shape(rate=1000, buffer=300_000))
    near, _ = ends.connect()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    near.setblocking(False)
    sent = 0
    while select.select([], [near], [], 0.5)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += near.send(bytes(100_000))
    assert 300_000 <= sent <= 300_000 + KERNEL + 2 * SOCKET_BUFFER
    assert 300_000 <= ends.link.counts().up.taken <= 310_000


@pytest.mark.needs("netns")
def test_a_frozen_link_says_nothing_until_it_goes_on(ends: Ends) -> None:
    near, far = ends.connect()
    ends.link.freeze()
    near.sendall(b"late")
    later = ends.dial()
    later.sendall(b"later")
    gone = ends.dial()
    gone.close()
    assert is_silent(far) and is_silent(near)
    assert ends.link.counts().up.passed == 0
    ends.link.resume()
    assert read(far, 4) == b"late"
    other, _ = ends.server.accept()
    with other:
        assert read(other, 5) == b"later"


@pytest.mark.needs("netns")
def test_a_cut_resets_both_ends(ends: Ends) -> None:
    ends.link.shape(Shape(delay=3600))
    near, far = ends.connect()
    near.sendall(b"lost")
    wait_until(lambda: ends.link.counts().up.taken == 4, "the reading of it")
    ends.link.cut()
    for each in (near, far):
        with pytest.raises(ConnectionResetError):
            each.recv(1)
    ends.link.shape(Shape())
    near, far = ends.connect()
    near.sendall(b"again")
    assert read(far, 5) == b"again"
    ends.link.refuse()
    with pytest.raises(ConnectionRefusedError):
        ends.dial()
    ends.link.accept()
    ends.connect()


@pytest.mark.needs("netns")
def test_a_trap_springs_at_its_byte(ends: Ends) -> None:
    near, far = ends.connect()
    ends.link.trap("up", 3_000_001, "freeze")
    sender = threading.Thread(target=near.sendall, args=(bytes(3_100_000),))
    sender.start()
    assert len(read(far, 3_000_001)) == 3_000_001
    ends.link.until_sprung()
    assert is_silent(far)
    assert ends.link.counts().up.passed == 3_000_001
    ends.link.resume()
    assert len(read(far, 99_999)) == 99_999
    sender.join()
    ends.link.trap("down", 1000, "refuse")
    far.sendall(bytes(2000))
    with contextlib.suppress(ConnectionResetError):  # it may overtake what was read last
        assert len(read(near, 2000)) <= 1000
    ends.link.until_sprung(2)
    assert ends.link.counts().down.passed == 1000
    with pytest.raises(ConnectionRefusedError):
        ends.dial()


@pytest.mark.needs("netns")
def test_a_link_to_nobody(ends: Ends) -> None:
    ends.server.close()
    with pytest.raises(ConnectionResetError):
        ends.dial().recv(1)


@pytest.mark.needs("netns", "sshd")
def test_ssh_over_a_link(net: NetLab) -> None:
    net.sshd.allow(["cat"])
    link = net.link(Shape(rate=20e6, delay=0.005), down=Shape(delay=0.02))
    assert net.url("/replica.img", via=link) == f"ssh://127.0.0.1:{link.port}/replica.img"
    assert net.ssh(via=link, input="hello").stdout == "hello"
    assert link.counts().accepted == 1
    before = link.counts().up.passed
    link.trap("up", 1_000_000, "cut")
    done = net.ssh(via=link, input="x" * 2_000_000)
    assert done.returncode == 255
    # Which, depends on what ssh does at the moment.
    assert "reset by" in done.stderr or "Broken pipe" in done.stderr, done.stderr
    assert link.counts().up.passed - before == 1_000_000
    link.refuse()
    assert "Connection refused" in net.ssh(via=link).stderr
