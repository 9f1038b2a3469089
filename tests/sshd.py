"""A real sshd for tests, with keys of its own, and the client's side of it.

Nothing of the user's or the machine's ssh is read or written: no agent, no known hosts, no keys. On
the far side all commands run as root, by the forced command of the one key that is let in. One that
must not be root begins with `setpriv --reuid=65534 --regid=65534 --clear-groups` (UNPRIVILEGED), as
a user of the system that has a shell and is nobody's does not exist everywhere.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import netns
from tests.blockdev import TOP, run, wait_until
from tests.needs import TOOL_PATH
from tests.netns import Host

UNPRIVILEGED = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
PORT = 22
# Compiled into Debian's sshd: it wants it empty and root's. systemd or the init script makes it
# where a server runs. It stays, as another sshd may need it by now.
_PRIVSEP = Path("/run/sshd")
# Bash reads .bashrc in a session of sshd (SSH_SOURCE_BASHRC), unless it is not the outermost shell.
_NO_BASHRC = {"SHLVL": "1"}


class Sshd:
    """A server on `host`, whose commands get `env` on top of what sshd gives; see sshd(8)."""

    def __init__(self, host: Host, folder: Path, env: Mapping[str, str]) -> None:
        self.host, self.folder = host, folder
        self._servers: list[subprocess.Popen[bytes]] = []
        for name in ("host_key", "client_key", "other_host_key", "other_client_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name)
        self._config = folder / "sshd_config"
        self._log = folder / "sshd.log"
        self._pid_file = folder / "sshd.pid"
        self._config.write_text(self._settings({**_NO_BASHRC, **_watched(), **env}))
        # Newer ones turn away an address that failed to log in (OpenSSH 9.8); older do not know it.
        with_more = folder / "sshd_config.new"
        with_more.write_text(self._config.read_text() + "PerSourcePenalties no\n")
        _PRIVSEP.mkdir(mode=0o755, exist_ok=True)
        test: list[str | Path] = [_sshd(), "-t", "-f", with_more]
        if subprocess.run(test, capture_output=True, check=False).returncode == 0:
            with_more.rename(self._config)
        self.allow(["/bin/false"])

    def _settings(self, env: Mapping[str, str]) -> str:
        variables = " ".join(f'"{name}={value}"' for name, value in env.items())
        # Newer key exchanges cost a tenth of a second for each connection.
        return f"""\
KexAlgorithms curve25519-sha256
ListenAddress {self.host.address}:{PORT}
HostKey {self.folder}/host_key
PidFile {self._pid_file}
AuthorizedKeysFile {self.folder}/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitUserRC no
UseDNS no
MaxStartups 100
LogLevel VERBOSE
SetEnv {variables}
"""

    def allow(self, command: Sequence[str | Path] | None) -> None:
        """The forced command from now on; with None, any command that the client asks for."""
        options = "restrict"
        if command is not None:
            line = shlex.join(str(word) for word in command)
            options += ',command="{}"'.format(line.replace('"', '\\"'))
        self._authorize(f"{options} {(self.folder / 'client_key.pub').read_text()}")

    def allow_nobody(self) -> None:
        self._authorize("")

    def _authorize(self, line: str) -> None:
        new = self.folder / "authorized_keys.new"
        new.write_text(line)
        new.rename(self.folder / "authorized_keys")

    def start(self) -> None:
        """It listens on return."""
        self._pid_file.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            command: list[str | Path] = [_sshd(), "-D", "-e", "-f", self._config]
            process = self.host.start(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._servers.append(process)

        def listening() -> bool:
            assert process.poll() is None, f"sshd ended: {self.log()}"
            return self._pid_file.exists()

        wait_until(listening, "sshd")

    def kill(self) -> None:
        """SIGKILL for the server and all its sessions, not for the commands of these."""
        netns.kill(self.host.path, _is_sshd)

    def commands(self) -> set[int]:
        """The processes of all forced commands, with shells that they run in and children."""
        # What a test runs there by itself is none of them; what has lost its session is.
        others = [process for process in self.host.started if process not in self._servers]
        pids = self.host.processes() - self.host.descendants(others)
        return {pid for pid in pids if _program(pid) and not _is_sshd(pid)}

    def kill_commands(self) -> set[int]:
        """SIGKILL for them; their sessions end of it, the server does not. Which they were."""
        found = self.commands()
        netns.kill(self.host.path, found.__contains__)
        return found

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def client(
        self, *, host_key: str = "host_key", key: str = "client_key", strict: bool = True
    ) -> str:
        """The words of an ssh that knows the server; for BLKTRACK_SSH.

        With host_key="other_host_key" it knows another key of it, with "" none at all; with
        key="other_client_key" the server does not let it in. With strict=False the configuration
        leaves open what to do about an unknown host, which for ssh is to ask.
        """
        name = f"client-{host_key}-{key}-{strict}"
        known = self.folder / f"{name}.known_hosts"
        known.write_text(f"* {(self.folder / f'{host_key}.pub').read_text()}" if host_key else "")
        config = self.folder / name
        config.write_text(f"""\
User root
IdentityFile {self.folder}/{key}
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {known}
GlobalKnownHostsFile none
StrictHostKeyChecking {"yes" if strict else "ask"}
ControlMaster no
ControlPath none
""")
        return f"ssh -F {config}"


def _sshd() -> str:
    found = shutil.which("sshd", path=TOOL_PATH)
    assert found is not None
    return found  # it starts itself anew for each connection, so it wants its whole path


def _program(pid: int) -> str:
    """ "" if it has ended."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""


def _is_sshd(pid: int) -> bool:
    """sshd, or sshd-session and sshd-auth of newer ones."""
    return _program(pid).startswith("sshd")


def _watched() -> dict[str, str]:
    """For commands of this clone, watched like those that tests start themselves."""
    names = [name for name in os.environ if name.startswith("BLKTRACK_REACHED")]
    paths = [str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {name: os.environ[name] for name in names} | {"PYTHONPATH": os.pathsep.join(paths)}
