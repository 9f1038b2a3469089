"""How a connection begins: what comes before it, what comes instead, and versions that differ."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blktrack import __version__
from blktrack.errors import BlktrackError
from blktrack.ship.wire import hello
from blktrack.ship.wire.errors import ConnectionLost, NoKeeper, ProtocolError

LINE = b"blktrack-recv protocol=1-1 version=0.1.0 host=vault\n"
ANSWER = f"blktrack-sync protocol=1 version={__version__} patience=30\n".encode()


class Peer:
    """Says some bytes, then is gone."""

    def __init__(self, says: bytes) -> None:
        self.says = says
        self.at = 0
        self.heard = b""

    def read(self, view: memoryview) -> None:
        part = self.says[self.at : self.at + len(view)]
        self.at += len(part)
        if len(part) < len(view):
            raise ConnectionLost("vault", "it ended")
        view[:] = part

    def write(self, data: bytes) -> None:
        self.heard += data

    @property
    def left(self) -> bytes:
        return self.says[self.at :]


def greeted(says: bytes, *, patience: float = 30.0) -> tuple[hello.Hello, Peer]:
    peer = Peer(says)
    return hello.greet(peer.read, peer.write, peer="vault", patience=patience), peer


def accepted(says: bytes) -> float:
    return hello.accept(Peer(says).read)


def test_both_sides_understand_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "vault.example\n\x1b[2J")
    said, peer = greeted(hello.announce() + b"what follows", patience=2.5)
    assert said == hello.Hello(1, __version__, "vault.example2J")
    assert peer.left == b"what follows", "not a byte more was read"
    assert accepted(peer.heard) == 2.5


def test_a_host_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "")
    assert greeted(hello.announce())[0].host == "unknown"


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\n",
        b"\r\n\r\n",
        b"Welcome to vault!\nYou have mail.\n",
        b"prompt without an end: ",
        b"\xff\xfe\x00 no text\n",
        b"blktrack-recv is spoken here\n",
        b"blktrack-recv protocol=" + b"9" * 2000 + b"\n",
        b"x" * 65000 + b"\n",
        b"\n" * 65000,
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_noise_before_it(noise: bytes, end: bytes) -> None:
    said, peer = greeted(noise + LINE[:-1] + end + b"rest")
    assert (said.protocol, said.version, said.host) == (1, "0.1.0", "vault")
    assert peer.heard == ANSWER
    assert peer.left == b"rest"


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "it says 'SSH-2.0-OpenSSH_9.6' instead of starting"),
        (b"sftp> ", "it says 'sftp>' instead of starting"),
        (
            b"Welcome!\n\nThis service allows sftp connections only.\n",
            "it says 'This service allows sftp connections only.' instead of starting",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it says 'HTTP/1.1 400 Bad Request' instead"),
        (b"\x1b[31mred\x07", r"it says '\?\[31mred\?' instead"),
        (b"x" * 70000, f"it says '{'x' * 80}' instead"),
        (b"Hello!!\n" * 20000, "it says 'Hello!!' instead"),
        (LINE[:-1], "it says 'blktrack-recv protocol=1-1 version=0.1.0 host=vault' instead"),
        (LINE[:-1] + b" x" * 600 + b"\n", "it says 'blktrack-recv protocol=1-1"),
    ],
)
def test_another_program(says: bytes, shown: str) -> None:
    with pytest.raises(NoKeeper, match=shown) as caught:
        greeted(says)
    assert "vault breaks the protocol" in str(caught.value)
    assert "blktrack recv --serve" in caught.value.hint


def test_too_much_noise_is_not_read_on() -> None:
    peer = Peer(b"y\n" * 10**6)
    with pytest.raises(NoKeeper):
        hello.greet(peer.read, peer.write, peer="vault", patience=30)
    assert peer.at == 64 << 10 and not peer.heard


@pytest.mark.parametrize("says", [b"", b"\r\n\r\n"])
def test_nothing_said(says: bytes) -> None:
    with pytest.raises(ConnectionLost) as caught:
        greeted(says)
    assert str(caught.value) == "the connection to vault was lost: it ended"


def test_a_newer_keeper_that_speaks_ours() -> None:
    line = b"blktrack-recv protocol=1-7 version=9.1 host=vault compress=lz9 new\n"
    assert greeted(line)[0] == hello.Hello(1, "9.1", "vault")


@pytest.mark.parametrize(
    ("range_", "where"), [("2-3", "this host"), ("9999-9999", "this host"), ("0-0", "that host")]
)
def test_no_protocol_in_common(range_: str, where: str) -> None:
    peer = Peer(f"blktrack-recv protocol={range_} version=7.0 host=vault\n".encode())
    with pytest.raises(ProtocolError) as caught:
        hello.greet(peer.read, peer.write, peer="vault", patience=30)
    spoken = range_.replace("-", " to ")
    expected = f"blktrack 7.0 there speaks protocol {spoken}, and 1 is spoken here"
    assert expected in str(caught.value)
    assert caught.value.hint == f"upgrade blktrack on {where}"
    assert peer.heard == b""


def test_ranges_that_only_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "OLDEST", 2)
    monkeypatch.setattr(hello, "NEWEST", 4)
    for range_, chosen in (("1-2", 2), ("1-3", 3), ("2-9", 4), ("4-9", 4)):
        line = f"blktrack-recv protocol={range_} version=1 host=h\n".encode()
        assert greeted(line)[0].protocol == chosen
    for range_ in ("1-1", "5-9"):
        with pytest.raises(ProtocolError, match="and 2 to 4 is spoken here"):
            greeted(f"blktrack-recv protocol={range_} version=1 host=h\n".encode())
    with pytest.raises(ProtocolError, match="it wants protocol '5', and 2 to 4 is"):
        accepted(b"blktrack-sync protocol=5 version=1\n")
    assert accepted(b"blktrack-sync protocol=4 version=1\n") == hello.PATIENCE


@pytest.mark.parametrize(
    "word", ["1", "", "-", "1-", "-1", "a-b", "1-1-1", "1--1", "+1-1", "12345-12345", "9" * 900]
)
def test_a_range_that_is_none(word: str) -> None:
    with pytest.raises(ProtocolError, match="it begins with 'blktrack-recv protocol="):
        greeted(f"blktrack-recv protocol={word} version=1 host=h\n".encode())


def test_what_is_shown_is_printable() -> None:
    with pytest.raises(ProtocolError) as caught:
        greeted(b"blktrack-recv protocol=5-6 version=\x1b[2J\xff host=h\n")
    assert "blktrack ?[2J\ufffd there" in str(caught.value)


@pytest.mark.parametrize("given", ["1", "1.5", "30", "3600", "1e2"])
def test_patience(given: str) -> None:
    assert accepted(f"blktrack-sync protocol=1 patience={given}\r\n".encode()) == float(given)


@pytest.mark.parametrize("given", ["0", "0.999", "-5", "3601", "inf", "nan", "", "soon", "1e999"])
def test_patience_out_of_range(given: str) -> None:
    with pytest.raises(ProtocolError, match=f"the source breaks .* patience is '{given}'"):
        accepted(f"blktrack-sync protocol=1 patience={given}\n".encode())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"blktrack-sync protocol=0\n", "it wants protocol '0', and 1 is spoken here"),
        (b"blktrack-sync protocol=2\n", "it wants protocol '2', and 1 is spoken here"),
        (b"blktrack-sync protocol=1-1\n", "it wants protocol '1-1'"),
        (b"blktrack-sync protocol=\n", "it wants protocol ''"),
        (b"blktrack-sync protocol=" + b"9" * 900 + b"\n", "it wants protocol '999"),
        (b"GET / HTTP/1.1\r\n", "it begins with 'GET / HTTP/1.1'"),
        (b"\n", "it begins with ''"),
        (b" blktrack-sync protocol=1\n", "it begins with 'blktrack-sync protocol=1'"),
        (b"blktrack-sync protocol=1" + b" " * 2000 + b"\n", "it begins with"),
        (bytes(5000), r"it begins with '\?\?\?"),
    ],
)
def test_a_source_that_is_none(line: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        accepted(line)


def test_a_source_that_says_nothing() -> None:
    for says in (b"", b"blktrack-sync protocol=1"):
        with pytest.raises(ConnectionLost):
            accepted(says)


@given(st.binary(max_size=300), st.binary(max_size=60))
@example(b"", "version=²".encode("latin-1"))
def test_whatever_is_said(noise: bytes, rest: bytes) -> None:
    """A hello or an error for people, and nothing else."""
    for says in (noise, noise + b"blktrack-recv protocol=" + rest + b"\n"):
        try:
            greeted(says)
        except BlktrackError as error:
            assert str(error).isprintable() and error.hint
    for says in (noise + b"\n", b"blktrack-sync protocol=" + rest + b"\n"):
        try:
            assert 1 <= accepted(says) <= 3600
        except BlktrackError as error:
            assert str(error).isprintable() and error.hint
