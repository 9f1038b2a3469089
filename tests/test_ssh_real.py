"""The transport over a real ssh to a real sshd: whom it trusts, what it says, how it notices."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from blktrack.ship.address import Address
from blktrack.ship.diagnosis import ConnectionFailed
from blktrack.ship.ssh import Connection
from tests.blockdev import TOP, run
from tests.netlab import NetLab
from tests.netns import FAR
from tests.terminal import Terminal

pytestmark = pytest.mark.needs("netns", "sshd")

LONG = 60.0
TALK = ["sh", "-c", 'echo "for $SSH_ORIGINAL_COMMAND"; cat; exit 7']


class Caller:
    """Connects from the near host to the far one, with one of the lab's clients."""

    def __init__(self, net: NetLab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.net, self._monkeypatch = net, monkeypatch
        net.sshd.allow(TALK)
        self.use(net.sshd.client())

    def use(self, client: str) -> None:
        (self.variable,) = self.net.environment_with(client).values()
        self._monkeypatch.setenv("BLKTRACK_SSH", self.variable)

    def connect(self, host: str = FAR, **options: float) -> Connection:
        address = Address.parse(f"ssh://{host}/a")
        return Connection.open(address, interactive=False, **options)  # type: ignore[arg-type]

    def failure(self, host: str = FAR, **options: float) -> ConnectionFailed:
        """Of a connection that does not come to be."""
        with self.connect(host, **options) as connection:
            assert connection.source.read() == b""
            return connection.failure(up=False, patience=LONG)


@pytest.fixture
def caller(net: NetLab, monkeypatch: pytest.MonkeyPatch) -> Caller:
    return Caller(net, monkeypatch)


def up(connection: Connection) -> None:
    expected = b"for blktrack recv --serve\n"
    assert connection.source.read(len(expected)) == expected, connection.said()


def test_bytes_go_through_as_they_are(caller: Caller) -> None:
    data = b"\r\n~.\n~C\n\x03\x04\x11\x13\xff\0" + bytes(range(256)) * 64
    with caller.connect() as connection:
        up(connection)
        assert connection.sink.write(data) == len(data)
        connection.sink.close()
        assert connection.source.readall() == data
        assert connection.close() == 7
        assert connection.said() == ""


def test_unknown_and_changed_hosts_are_not_trusted(caller: Caller) -> None:
    """Whatever the configuration says, as nobody is there to look at the fingerprint."""
    sshd = caller.net.sshd
    for strict in ("ask", "no", "accept-new", "yes"):
        client = sshd.client(host_key="", strict=False)
        config = Path(client.split()[-1])
        text = config.read_text(encoding="utf-8")
        assert "StrictHostKeyChecking ask" in text
        config.write_text(text.replace("Checking ask", f"Checking {strict}"), encoding="utf-8")
        caller.use(client)
        error = caller.failure()
        assert "host key is known for" in str(error) and not error.retriable
        assert f"run `ssh {FAR}` once by hand" in error.hint
        known = config.with_name(f"{config.name}.known_hosts")
        assert known.read_bytes() == b""
    caller.use(sshd.client(host_key="other_host_key"))
    error = caller.failure()
    assert "has changed" in str(error) and not error.retriable
    assert "another machine" in error.hint


def test_who_is_not_let_in(caller: Caller) -> None:
    caller.use(caller.net.sshd.client(key="other_client_key"))
    error = caller.failure()
    assert f"cannot connect to {FAR}: root@{FAR}: Permission denied" in str(error)
    assert "authorized_keys" in error.hint and not error.retriable


def test_what_there_is_no_way_to(caller: Caller) -> None:
    net = caller.net
    for spoil, mend, said in (
        (net.sshd.kill, net.sshd.start, "Connection refused"),
        (net.unreachable, net.reachable, "No route to host"),
        (net.interface_down, net.link_up, "Network is unreachable"),
    ):
        spoil()
        error = caller.failure()
        assert said in str(error) and error.retriable
        mend()
        with caller.connect() as connection:
            up(connection)
    net.link_down()
    before = time.monotonic()
    error = caller.failure(connect_timeout=1)
    assert "timed out" in str(error) and error.retriable
    assert time.monotonic() - before < LONG / 2


def test_a_host_that_is_no_more_is_noticed(caller: Caller) -> None:
    with caller.connect(dead_after=4) as connection:
        up(connection)
        caller.net.link_down()
        before = time.monotonic()
        assert connection.source.read() == b""
        assert time.monotonic() - before < LONG / 2
        error = connection.failure(up=True, patience=LONG)
    assert "lost: Timeout, server" in str(error) and error.retriable


def test_what_is_killed_over_there(caller: Caller) -> None:
    with caller.connect() as connection:
        up(connection)
        assert caller.net.sshd.kill_commands()
        assert connection.source.read() == b""
        error = connection.failure(up=True, patience=LONG)
    assert f"the connection to {FAR} was lost: what ran there was killed" in str(error)
    assert error.retriable
    with caller.connect() as connection:
        up(connection)
        caller.net.sshd.kill()
        assert connection.source.read() == b""
        error = connection.failure(up=True, patience=LONG)
    assert "closed by remote host" in str(error) and error.retriable


def test_there_is_no_blktrack(caller: Caller) -> None:
    caller.net.sshd.allow(["env", "-i", "PATH=/nowhere", "/bin/sh", "-c", "blktrack recv"])
    error = caller.failure()
    assert f"{FAR} has no blktrack: " in str(error) and "not found" in str(error)
    assert (error.code, error.retriable) == (127, False)
    caller.net.sshd.allow(["/etc/passwd"])
    error = caller.failure()
    assert f"{FAR} cannot run blktrack: " in str(error) and error.code == 126


def test_a_mistake_in_the_configuration(caller: Caller) -> None:
    client = caller.net.sshd.client()
    config = Path(client.split()[-1])
    config.write_text(f"Nonsense yes\n{config.read_text(encoding='utf-8')}", encoding="utf-8")
    caller.use(client)
    error = caller.failure()
    assert "bad configuration options" in str(error).lower() and not error.retriable


def test_configuration_that_would_put_itself_into_the_stream(caller: Caller) -> None:
    client = caller.net.sshd.client()
    config = Path(client.split()[-1])
    more = "RemoteCommand uptime\nPermitLocalCommand yes\nLocalCommand echo noise\n"
    more += "RequestTTY force\nLogLevel QUIET\nCompression yes\n"
    config.write_text(more + config.read_text(encoding="utf-8"), encoding="utf-8")
    caller.use(client)
    with caller.connect() as connection:
        up(connection)
    caller.net.sshd.kill()
    assert "Connection refused" in str(caller.failure())


ON_TERMINAL = """
import signal, sys, threading
from blktrack.ship.address import Address
from blktrack.ship.ssh import Connection
stop = threading.Event()
signal.signal(signal.SIGINT, lambda *_: stop.set())
address = Address.parse(sys.argv[1])
with Connection.open(address, interactive=True) as connection:
    line = connection.source.read(26)
    if not line:
        sys.exit(str(connection.failure(up=False, patience=30)))
    print("up with", line, flush=True)
    stop.wait()
    connection.sink.write(b"still")
    print(connection.source.read(5), connection.close(), flush=True)
"""


def on_terminal(caller: Caller) -> Terminal:
    words = [sys.executable, "-c", ON_TERMINAL, f"ssh://{FAR}/a"]
    return Terminal(words, env={"PYTHONPATH": str(TOP), "BLKTRACK_SSH": caller.variable})


def finish(terminal: Terminal) -> None:
    """Ctrl-C ends the run, which then still has its connection."""
    terminal.until("up with b'for blktrack recv --serve")
    terminal.send("\x03")
    terminal.until("b'still' 7")
    assert terminal.end() == 0


def test_a_person_may_accept_a_new_host(caller: Caller) -> None:
    for answer in ("no", "yes"):
        caller.use(caller.net.sshd.client(host_key="", strict=False))
        with on_terminal(caller) as terminal:
            terminal.until("key fingerprint is SHA256:")
            terminal.until("continue connecting")
            terminal.send(f"{answer}\r")
            if answer == "no":
                terminal.until("Host key verification failed")
                assert terminal.end() == 1
            else:
                finish(terminal)
    caller.use(caller.net.sshd.client(host_key="", strict=True))
    with on_terminal(caller) as terminal:
        terminal.until("host key is known for")
        assert terminal.end() == 1
    assert "continue connecting" not in terminal.screen


def test_a_person_is_asked_for_a_passphrase(caller: Caller) -> None:
    key = caller.net.sshd.folder / "client_key"
    run("ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", key)
    with on_terminal(caller) as terminal:
        terminal.until("Enter passphrase for key")
        terminal.send("open sesame\r")
        finish(terminal)
    with on_terminal(caller) as terminal:
        terminal.until("Enter passphrase for key")
        terminal.send("\x03")
        terminal.until("Permission denied")
        assert terminal.end() == 1
    error = caller.failure()  # nobody is asked where nobody is
    assert "Permission denied" in str(error)
