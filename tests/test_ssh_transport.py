"""The transport with something else in the place of ssh: what is carried, what is said of it, how
it ends. tests/test_ssh_real.py goes on with a real one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.errors import UsageError
from blktrack.ship.address import Address
from blktrack.ship.diagnosis import ConnectionFailed, diagnose
from blktrack.ship.ssh import Connection
from tests.blockdev import TOP, wait_until
from tests.terminal import Terminal

ADDRESS = Address.parse("ssh://admin@backup.example:2222/srv/disk.img")
# Runs its last argument, as the far side's shell does.
CARRIES = 'shift $(($# - 1)); exec sh -c "$1"'
LONG = 30.0

StandIn = Callable[[str], Path]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Puts a shell script in the place of ssh."""

    def put(script: str) -> Path:
        path = tmp_path / "ssh stand-in"
        path.write_text(script, encoding="utf-8")
        monkeypatch.setenv("BLKTRACK_SSH", f"sh {shlex.quote(str(path))}")
        return path

    return put


def connect(command: str, *, interactive: bool = False) -> Connection:
    return Connection.open(ADDRESS, command=command, interactive=interactive)


def test_bytes_go_both_ways(stand_in: StandIn) -> None:
    stand_in(CARRIES)
    data = bytes(range(256)) * 16
    with connect("cat; echo done >&2") as connection:
        assert connection.exit_code() is None
        assert connection.sink.write(data) == len(data)
        got = bytearray(len(data))
        left = memoryview(got)
        while left:
            left = left[connection.source.readinto(left) :]
        assert got == data
        assert stat.S_ISFIFO(os.fstat(connection.source.fileno()).st_mode)
        assert stat.S_ISFIFO(os.fstat(connection.sink.fileno()).st_mode)
        connection.sink.close()
        assert connection.source.read() == b""
        assert connection.close() == 0
    assert connection.said() == "done"


def test_what_is_said_is_bounded_and_of_printable_characters(stand_in: StandIn) -> None:
    stand_in(CARRIES)
    flood = "i=0; while [ $i -lt 5000 ]; do echo some noise number $i; i=$((i+1)); done >&2"
    with connect(
        f"{flood}; printf '\\033[2Jred\\007\\r\\nlast\\377 \\303\\274\\n' >&2"
    ) as connection:
        assert connection.source.read() == b""
        assert connection.close() == 0
    said = connection.said()
    assert 8 << 10 < len(said) <= 16 << 10
    assert said.splitlines()[-2:] == ["[2Jred", "last\ufffd ü"]


def test_how_ssh_is_called(stand_in: StandIn, tmp_path: Path) -> None:
    """All that makes it quiet, transparent and strict; see ssh(1), ssh_config(5)."""
    out = tmp_path / "words"
    for config, interactive, strict in (
        ("ask", False, "yes"),
        ("ask", True, "ask"),
        ("accept-new", True, "ask"),
        ("false", True, "ask"),
        ("true", True, "yes"),
        ("", True, "yes"),
    ):
        stand_in(
            f'case " $* " in *" -G "*) echo user x; echo stricthostkeychecking {config};'
            f" exit ;; esac; printf '%s\\0' \"$@\" >{shlex.quote(str(out))}"
        )
        with connect("far command", interactive=interactive) as connection:
            assert connection.exit_code(LONG) == 0
        words = out.read_text(encoding="utf-8").split("\0")[:-1]
        assert words[-7:] == ["-l", "admin", "-p", "2222", "--", "backup.example", "far command"]
        options = dict(word.split("=", 1) for word in words if "=" in word)
        assert options.pop("StrictHostKeyChecking") == strict
        assert options.pop("BatchMode", "no") == ("no" if interactive else "yes")
        assert options == {
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "PermitLocalCommand": "no",
            "ControlMaster": "no",
            "ControlPath": "none",
            "Compression": "no",
            "LogLevel": "INFO",
            "ConnectionAttempts": "1",
            "ConnectTimeout": "15",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "3",
        }
        assert words[:5] == ["-T", "-x", "-a", "-e", "none"]


def test_there_is_no_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLKTRACK_SSH", f"{tmp_path}/none -v")
    with pytest.raises(ConnectionFailed) as caught:
        connect("true")
    assert f"there is no {tmp_path}/none" in str(caught.value)
    assert "BLKTRACK_SSH" in caught.value.hint and not caught.value.retriable
    monkeypatch.delenv("BLKTRACK_SSH")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectionFailed) as caught:
        connect("true")
    assert str(caught.value) == "cannot connect to backup.example: there is no ssh on this host"
    assert caught.value.hint == "install openssh-client"
    monkeypatch.setenv("BLKTRACK_SSH", "ssh 'unended")
    with pytest.raises(UsageError, match="BLKTRACK_SSH is not a command: No closing quotation"):
        connect("true")


UNKNOWN_KEY = """\
No ED25519 host key is known for backup.example and you have requested strict checking.
Host key verification failed.
"""
CHANGED_KEY = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
Offending ED25519 key in /root/.ssh/known_hosts:1
Host key for backup.example has changed and you have requested strict checking.
Host key verification failed.
"""
BAD_KEY_FILE = """\
Load key "/root/.ssh/id_ed25519": bad permissions
admin@backup.example: Permission denied (publickey,keyboard-interactive).
"""
CUT_BY_PROXY = """\
channel 0: open failed: connect failed: No route to host
stdio forwarding failed
Connection closed by UNKNOWN port 65535
"""


@pytest.mark.parametrize(
    ("said", "code", "message", "hint", "retriable"),
    [
        # As OpenSSH 9.2 has them.
        (UNKNOWN_KEY, 255, "No ED25519 host key is known", "fingerprint is right", False),
        ("Host key verification failed.", 255, "Host key verification", "fingerprint", False),
        (CHANGED_KEY, 255, "has changed", "another machine", False),
        (BAD_KEY_FILE, 255, "Permission denied (publickey", "authorized_keys", False),
        (
            "Received disconnect from 192.0.2.7 port 22:2: Too many authentication failures\n"
            "Disconnected from 192.0.2.7 port 22",
            255,
            "Too many authentication failures",
            "authorized_keys",
            False,
        ),
        (
            "gate: Permission denied (publickey).\nConnection closed by UNKNOWN port 65535",
            255,
            "gate: Permission denied",
            "authorized_keys",
            False,
        ),
        (
            "ssh: Could not resolve hostname backup.example: Name or service not known",
            255,
            ": Could not resolve hostname backup.example: Name or service not known",
            "check the name",
            False,
        ),
        (
            "ssh: Could not resolve hostname backup.example: Temporary failure in name resolution",
            255,
            "Temporary failure",
            "network",
            True,
        ),
        (
            "command-line: line 0: Bad configuration option: nonsense",
            255,
            "Bad configuration",
            "configuration of ssh",
            False,
        ),
        (
            "/root/.ssh/config line 3: invalid time value.",
            255,
            "invalid time value",
            "configuration of ssh",
            False,
        ),
        (
            "Unable to negotiate with 192.0.2.7 port 22: no matching host key type found. "
            "Their offer: ssh-rsa",
            255,
            "no matching host key type",
            "algorithm",
            False,
        ),
        (
            "ssh: connect to host 192.0.2.7 port 22: Connection refused",
            255,
            "cannot connect to backup.example: connect to host 192.0.2.7 port 22: Connection ref",
            "sshd runs there",
            True,
        ),
        ("ssh: connect to host h port 22: No route to host", 255, "No route", "network", True),
        ("ssh: connect to host h port 22: Connection timed out", 255, "timed out", "network", True),
        ("ssh: connect to host h port 22: Network is unreachable", 255, "unreach", "network", True),
        ("Connection timed out during banner exchange", 255, "banner", "network", True),
        (
            "kex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by 127.0.0.1 port 22423",
            255,
            "Connection closed by 127.0.0.1",
            "network",
            True,
        ),
        (
            "kex_exchange_identification: read: Connection reset by peer",
            255,
            "Connection reset by peer",
            "network",
            True,
        ),
        (CUT_BY_PROXY, 255, "Connection closed", "network", True),
        ("Timeout, server backup.example not responding.", 255, "not responding", "network", True),
        ("Connection to backup.example closed by remote host.", 255, "closed", "network", True),
        ("client_loop: send disconnect: Broken pipe", 255, "Broken pipe", "network", True),
        ("something new\nin two lines.", 255, ": in two lines", "see what `ssh -p", True),
        ("", 255, "what ran there was killed", "see what", True),
        ("", -9, "ssh was ended by signal 9", "see what", True),
        ("", None, "it does not answer", "network", True),
        (
            "bash: line 1: blktrack: command not found",
            127,
            "backup.example has no blktrack: bash: line 1: blktrack: command not found",
            "PATH",
            False,
        ),
        ("", 127, "backup.example has no blktrack", "PATH", False),
        (
            "sh: 1: blktrack: Permission denied",
            126,
            "backup.example cannot run blktrack: sh: 1: blktrack: Permission denied",
            "permissions",
            False,
        ),
    ],
)
def test_why_it_failed(
    said: str, code: int | None, message: str, hint: str, retriable: bool
) -> None:
    for up in (False, True):
        ssh = "ssh -p 2222 admin@backup.example"
        error = diagnose("backup.example", ssh, code, said, up=up)
        assert message.replace("cannot connect to backup.example: ", "") in str(error)
        assert "backup.example" in str(error) and hint in error.hint and "{" not in error.hint
        assert (error.retriable, error.code, error.exit_code) == (retriable, code, 1)
        if code not in (126, 127):
            begin = "the connection to backup.example was lost" if up else "cannot connect to back"
            assert str(error).startswith(begin)


@pytest.mark.parametrize(("up", "retriable"), [(False, False), (True, True)])
def test_what_ran_there_was_something_else(stand_in: StandIn, up: bool, retriable: bool) -> None:
    """Or blktrack that ended by itself: then again is not in vain."""
    stand_in(CARRIES)
    with connect("echo no such thing here >&2; exit 3") as connection:
        assert connection.source.read() == b""
        error = connection.failure(up=up, patience=LONG)
    expected = "what ssh ran on backup.example ended with code 3: no such thing here"
    assert str(error) == expected
    assert "`ssh -p 2222 admin@backup.example blktrack recv --serve`" in error.hint
    assert (error.code, error.retriable) == (3, retriable)


def test_failures_of_a_process(stand_in: StandIn) -> None:
    stand_in('echo "ssh: connect to host 192.0.2.7 port 22: No route to host" >&2; exit 255')
    with connect("true") as connection:
        assert connection.source.read() == b""
        error = connection.failure(up=False, patience=LONG)
    assert str(error) == (
        "cannot connect to backup.example: connect to host 192.0.2.7 port 22: No route to host"
    )
    stand_in(CARRIES)
    with connect("no-such-command") as connection:
        error = connection.failure(up=False, patience=LONG)
    assert "backup.example has no blktrack: " in str(error) and error.code == 127
    with connect("exec cat") as connection:
        error = connection.failure(up=False, patience=0.01)
        assert (str(error), error.code) == (
            "cannot connect to backup.example: it does not answer",
            None,
        )


def test_close_ends_what_does_not_end_by_itself(stand_in: StandIn) -> None:
    stand_in(CARRIES)
    connection = connect("trap '' TERM; echo up; while :; do sleep 0.05; done")
    assert connection.source.read(3) == b"up\n"
    assert connection.close(patience=0.01) == -signal.SIGKILL
    connection = connect("echo up; exec sleep 60")
    assert connection.source.read(3) == b"up\n"
    assert connection.close(patience=0.01) == -signal.SIGTERM
    # After an error nobody waits for an end that is its own.
    with pytest.raises(ZeroDivisionError), connect("echo up; exec cat") as connection:
        assert connection.source.read(3) == b"up\n"
        _ = 1 // 0
    assert connection.exit_code() == -signal.SIGTERM


def test_kill_gets_everybody_out(stand_in: StandIn) -> None:
    """One waits for what comes, another one for room."""
    stand_in(CARRIES)
    ends: list[object] = []

    def read() -> None:
        ends.append(connection.source.read(1))

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            while True:
                connection.sink.write(bytes(1 << 16))
        ends.append(b"")

    connection = connect("exec sleep 60")
    threads = [threading.Thread(target=work) for work in (read, write)]
    for thread in threads:
        thread.start()
    connection.kill()
    for thread in threads:
        thread.join(LONG)
    assert ends == [b"", b""]
    assert connection.close() == -signal.SIGTERM


def test_a_child_that_stays_holds_nobody_up(stand_in: StandIn) -> None:
    """As one of a ProxyCommand might: it has our standard error."""
    stand_in(CARRIES)
    before = time.monotonic()
    connection = connect("sleep 60 >/dev/null & echo $!; exit 4")
    pid = int(connection.source.read() or 0)
    try:
        assert connection.failure(up=False, patience=LONG).code == 4
        assert connection.close() == 4
        assert time.monotonic() - before < LONG
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not connection._reader.is_alive(), "the end of standard error")


ON_TERMINAL = """
import signal, threading
from blktrack.ship.address import Address
from blktrack.ship.ssh import Connection
stop = threading.Event()
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: stop.set())
address = Address.parse("ssh://far/a")
with Connection.open(address, command="echo up; exec cat", interactive=True) as connection:
    print(connection.source.read(3), flush=True)
    stop.wait()
    connection.sink.write(b"still")
    print(connection.source.read(5), connection.close(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_ends_a_run_at_its_terminal_leaves_the_connection(
    stand_in: StandIn, number: signal.Signals
) -> None:
    """Ctrl-C, and the loss of the terminal, are for blktrack to act on, when it comes to it."""
    stand_in(CARRIES)
    with Terminal([sys.executable, "-c", ON_TERMINAL], env={"PYTHONPATH": str(TOP)}) as terminal:
        terminal.until("up")
        if number == signal.SIGINT:
            terminal.send("\x03")
        else:
            os.killpg(terminal.pid, number)  # its session's group, as the kernel would
        terminal.until("b'still' 0")
        assert terminal.end() == 0
