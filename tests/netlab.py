"""Two hosts for tests: near, where the source is, and far, where an sshd and the replica are.

    with NetLab() as net:
        net.sshd.allow([sys.executable, "-m", "blktrack", "recv", "--serve"])
        lab.blktrack("sync", device, net.url("/replica.img"), env=net.environment)
        net.link_down()

Both share everything but the network (tests/netns.py), so a test reads the far replica as a file.
The far side has a BLKTRACK_ROOT of its own.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from tests.lane import Shape
from tests.link import Link
from tests.netns import FAR, Host, pair
from tests.sshd import PORT, Sshd


class NetLab:
    """A context. `far_env` is set for the commands that sshd starts. Needs netns and sshd."""

    near: Host
    far: Host
    folder: Path  # for files of the lab's life, readable for root alone
    sshd: Sshd

    def __init__(self, far_env: Mapping[str, str] | None = None) -> None:
        self._far_env = dict(far_env or {})
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as held:
            self.near, self.far, self.folder = held.enter_context(pair())
            keys = self.folder / "ssh"
            keys.mkdir()
            env = {"BLKTRACK_ROOT": str(self.folder / "far-root"), **self._far_env}
            self.sshd = Sshd(self.far, keys, env)
            self.sshd.start()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def url(self, path: str | Path, via: Link | None = None) -> str:
        """Of a file on the far host, reached over the cable or over a link."""
        return f"ssh://{FAR if via is None else f'{via.host}:{via.port}'}{path}"

    def link(self, both: Shape | None = None, *, down: Shape | None = None, seed: int = 0) -> Link:
        """To the far sshd, from the near host's own address; ends with the lab."""
        made = Link(self.near, (FAR, PORT), seed)
        if both is not None:
            made.shape(both, down=down)
        return made

    @property
    def environment(self) -> dict[str, str]:
        """For a blktrack in any namespace: its ssh is in the near one."""
        return self.environment_with(self.sshd.client())

    def environment_with(self, client: str) -> dict[str, str]:
        """The same with another of sshd.client()."""
        return {"BLKTRACK_SSH": " ".join([*self.near.prefix, client])}

    def ssh(
        self, *words: str, client: str | None = None, via: Link | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """The far host's answer to a command, once it has ended. `options` are Host.run's."""
        return self.near.run(self.ssh_command(*words, client=client, via=via), **options)

    def start_ssh(
        self, *words: str, client: str | None = None, via: Link | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """The same in the background; `options` are Popen's."""
        return self.near.start(self.ssh_command(*words, client=client, via=via), **options)

    def ssh_command(
        self, *words: str, client: str | None = None, via: Link | None = None
    ) -> list[str]:
        """To be run on the near host."""
        to = [FAR] if via is None else ["-p", str(via.port), via.host]
        return [*shlex.split(client or self.sshd.client()), *to, *words]

    def link_down(self) -> None:
        """The cable is pulled at the far end: what is sent is lost, without a word.

        An open connection stalls; a new one is "No route to host" once nobody answered for seconds.
        The near interface has no carrier, of which the kernel tells those who ask (RTM_NEWLINK).
        """
        self.far.set("down")

    def link_up(self) -> None:
        """Undoes link_down() and interface_down(). The near kernel sends again in its own time."""
        self.near.set("up")
        self.far.set("up")

    def interface_down(self) -> None:
        """The near interface goes down and its route with it: "Network is unreachable", at once.

        An open connection stalls all the same.
        """
        self.near.set("down")

    def unreachable(self) -> None:
        """A near route says that the far host cannot be had: "No route to host", at once."""
        with self.near.network() as network:
            network.route("replace", dst=f"{FAR}/32", type="unreachable")

    def reachable(self) -> None:
        """Undoes unreachable()."""
        with self.near.network() as network:
            network.route("del", dst=f"{FAR}/32", type="unreachable")


@pytest.fixture
def net() -> Iterator[NetLab]:
    """Say @pytest.mark.needs("netns", "sshd") where it is used."""
    with NetLab() as made:
        yield made
