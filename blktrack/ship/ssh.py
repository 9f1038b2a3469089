"""A connection to another host: the system's ssh, which starts a command there and carries bytes.

All of ssh is the user's: configuration, agent, known hosts, jump hosts. What is set here is what
scp sets too, so that nothing but the command's bytes comes through, and what must not depend on
whose configuration it is: an unknown host key is never accepted unless a person at the terminal
does so, and a host that is gone is noticed.

`BLKTRACK_SSH` stands in for `ssh`: words of a shell, which end in the words of an ssh. Of options
that are given twice ssh takes the first, so what it has wins over what is set here. A script has to
`exec` ssh, or it cannot be ended from here.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import threading
from typing import Self, cast

from blktrack.errors import UsageError
from blktrack.ship.address import Address
from blktrack.ship.diagnosis import ConnectionFailed, diagnose

COMMAND = "blktrack recv --serve"
VARIABLE = "BLKTRACK_SSH"

_KEPT = 16 << 10  # bytes of standard error
_ALIVE = 3  # unanswered questions to the far sshd: it counts as gone at the one after these
_ENDING = 2.0  # seconds that ssh gets to end after each signal
# The shell's only work is to have ssh ignore what a terminal sends to everybody in front of it, and
# ssh keeps to that (clientloop.c: "don't overwrite SIG_IGN"): the connection then lasts until what
# is under way has come to its end. A process group or session of its own would do too, but from
# there ssh could not ask for a passphrase: the terminal would stop it, or not be its own.
_SHELL = ("/bin/sh", "-c", 'trap "" INT HUP; exec "$@"', "sh")

_OPTIONS = (
    # No terminal, no escape character in what is carried, and nothing forwarded into the far side.
    *("-T", "-x", "-a", "-e", "none"),
    *("-o", "ClearAllForwardings=yes"),
    # Either would put itself in the place of the command, or its output into the stream.
    *("-o", "RemoteCommand=none", "-o", "PermitLocalCommand=no"),
    # A connection of its own: a shared one has none of these options but its first user's, carries
    # other sessions that wait for this one's bytes and hold up its own, and a master that is
    # started here would outlive this run, with our standard error open.
    *("-o", "ControlMaster=no", "-o", "ControlPath=none"),
    *("-o", "Compression=no"),  # the stream is compressed already
    *("-o", "LogLevel=INFO"),  # with less there would be no reason, with more no end
    *("-o", "ConnectionAttempts=1"),  # who calls tries again, and knows how long
)


def ssh_words() -> list[str]:
    """What to run as ssh. UsageError if BLKTRACK_SSH is no command."""
    try:
        words = shlex.split(os.environ.get(VARIABLE, ""))
    except ValueError as error:
        raise UsageError(
            f"{VARIABLE} is not a command: {error}", hint="write it as for a shell, or unset it"
        ) from None
    return words or ["ssh"]


def check() -> None:
    """UsageError if what is run as ssh is not there."""
    if missing := _missing(ssh_words()):
        what, hint = missing
        raise UsageError(f"{what}, by which other hosts are reached", hint=hint)


def _missing(words: list[str]) -> tuple[str, str] | None:
    """What is not there of what is run, and what to do about it."""
    if shutil.which(words[0]) is not None:
        return None
    hint = "install openssh-client" if words[0] == "ssh" else f"correct {VARIABLE}"
    return f"there is no {words[0]} on this host", hint


def login_words(address: Address) -> list[str]:
    """The options and the name that say whom to log in as, and where."""
    user = [] if address.user is None else ["-l", address.user]
    port = [] if address.port is None else ["-p", str(address.port)]
    return [*user, *port, "--", address.host]


def settings(address: Address, timeout: float = 1.0) -> dict[str, str]:
    """What ssh's configuration says for this host, by keywords in lower case; {} if unknown."""
    try:
        done = subprocess.run(
            [*ssh_words(), "-G", *login_words(address)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.decode(errors="replace").splitlines()
    # The first of each: some keywords may stand there several times.
    return {key: value for key, _, value in (line.partition(" ") for line in reversed(lines))}


def command_words(
    address: Address,
    command: str,
    *,
    interactive: bool,
    connect_timeout: float,
    dead_after: float,
) -> list[str]:
    """The whole command line."""
    if interactive and settings(address).get("stricthostkeychecking") in _LAXER_THAN_YES:
        manners = ["-o", "StrictHostKeyChecking=ask"]
    else:
        manners = ["-o", "StrictHostKeyChecking=yes"]
    if not interactive:
        manners += ["-o", "BatchMode=yes"]
    every = max(1, round(dead_after / (_ALIVE + 1)))
    manners += ["-o", f"ConnectTimeout={max(1, round(connect_timeout))}"]
    manners += ["-o", f"ServerAliveInterval={every}", "-o", f"ServerAliveCountMax={_ALIVE}"]
    return [*ssh_words(), *_OPTIONS, *manners, *login_words(address), command]


_LAXER_THAN_YES = ("ask", "accept-new", "false", "no", "off")


def _by_hand(address: Address) -> str:
    """What a person would type to log in."""
    port = [] if address.port is None else ["-p", str(address.port)]
    user = "" if address.user is None else f"{address.user}@"
    return shlex.join(["ssh", *port, user + address.host])


class Connection:
    """A running ssh. What it is about to tell comes with `failure()`, not when it is opened."""

    def __init__(self, address: Address, process: subprocess.Popen[bytes]) -> None:
        self.address = address
        # Of bufsize=0: raw files, whose write() may take less than it is given.
        self.source = cast(io.FileIO, process.stdout)  # what the far command writes
        self.sink = cast(io.FileIO, process.stdin)  # what it reads
        self._process = process
        self._tail = b""
        self._reader = threading.Thread(target=self._listen, name="ssh-stderr", daemon=True)
        self._reader.start()

    @classmethod
    def open(
        cls,
        address: Address,
        *,
        command: str = COMMAND,
        interactive: bool,
        connect_timeout: float = 15.0,
        dead_after: float = 60.0,
    ) -> Self:
        """Start ssh, which runs `command` in the shell of the far user.

        `interactive`: a person at the terminal can answer what ssh asks (for a passphrase, whether
        to accept a new host key). It connects within `connect_timeout` seconds, without the time
        that logging in takes, and ends when nothing came from the host for `dead_after`.
        ConnectionFailed if there is no ssh, UsageError if BLKTRACK_SSH is no command.
        """
        words = command_words(
            address,
            command,
            interactive=interactive,
            connect_timeout=connect_timeout,
            dead_after=dead_after,
        )
        if missing := _missing(words):
            what, hint = missing
            message = f"cannot connect to {address.name}: {what}"
            raise ConnectionFailed(message, hint=hint, retriable=False)
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*_SHELL, *words], bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe
        )
        return cls(address, process)

    def _listen(self) -> None:
        """Take in standard error, so that ssh never waits for it; its end is the thread's."""
        said = self._process.stderr
        assert said is not None
        with said:
            while data := said.read(4096):
                self._tail = (self._tail + data)[-_KEPT:]

    def said(self) -> str:
        """The last lines of what ssh, and the far command by it, wrote to standard error so far.

        They may be anybody's words: all but printable characters is left out.
        """
        lines = self._tail.decode(errors="replace").splitlines()
        return "\n".join("".join(c for c in line if c.isprintable()).strip() for line in lines)

    def exit_code(self, timeout: float = 0.0) -> int | None:
        """The far command's, or 255 if ssh failed, -N for a signal; None after `timeout` seconds in
        which it did not end."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def failure(self, *, up: bool, patience: float = 2.0) -> ConnectionFailed:
        """Why `source` ended, or `sink` broke, or nothing came; `up`: the far side had answered.

        Waits up to `patience` seconds for ssh to end, and to have told why.
        """
        code = self.exit_code(patience)
        if code is not None:
            self._reader.join(0.5)  # a child of its own may hold the pipe open
        return diagnose(self.address.name, _by_hand(self.address), code, self.said(), up=up)

    def kill(self) -> None:
        """End ssh at once. Who waits in `source` or `sink` gets their end."""
        self._process.terminate()  # it may have to give back a terminal that it asked on

    def close(self, patience: float = 5.0) -> int | None:
        """End the stream to the far command, which then has `patience` seconds to end; its code.

        Nobody may be in `source` or `sink` any more: kill() gets them out.
        """
        with contextlib.suppress(OSError):
            self.sink.close()
        for strike in (self._process.terminate, self._process.kill):
            if self.exit_code(patience) is not None:
                break
            strike()
            patience = _ENDING
        code = self.exit_code(_ENDING)
        self.source.close()
        self._reader.join(0.5)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.close()
