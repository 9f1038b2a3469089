"""Replicas here and elsewhere: over pipes, where the keeper stands in for ssh, and over ssh."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.blockdev import TOP, Lab
from tests.netlab import NetLab

KEEPER = (sys.executable, "-m", "blktrack", "recv")
every_way = pytest.mark.parametrize(
    "far",
    ["here", "pipe", pytest.param("ssh", marks=pytest.mark.needs("netns", "sshd"))],
    indirect=True,
)


@dataclass
class FarSide:
    """Where replicas are, as a folder here, and how blktrack names them."""

    way: str  # here, pipe or ssh
    folder: Path
    net: NetLab | None  # of ssh

    def name(self, replica: str = "replica") -> str:
        return self.device(str(self.folder / replica))

    def device(self, path: str) -> str:
        """A device of the far host, or any other path of it."""
        if self.net:
            return self.net.url(path)
        return path if self.way == "here" else f"ssh://far{path}"

    def path(self, replica: str = "replica") -> Path:
        return self.folder / replica

    def serve(self, *options: str, env: Sequence[str] = ()) -> str:
        """Have the keeper run so from now on; the command for BLKTRACK_SSH.

        options -- of `blktrack recv`. env -- words NAME=VALUE for it.
        """
        words = ["env", f"PYTHONPATH={TOP}", *env, *KEEPER, *(options or ("--serve",))]
        if self.net:
            self.net.sshd.allow(words)
            return self.net.environment["BLKTRACK_SSH"]
        return pipe(self.folder.parent, words)


def pipe(folder: Path, words: Sequence[str] = (*KEEPER, "--serve")) -> str:
    """A command for BLKTRACK_SSH that runs the keeper over pipes, with its state in `folder`."""
    script = folder / "pipe"
    new = folder / "pipe.new"
    new.write_text(
        "#!/bin/sh\n"
        'for word; do [ "$word" != -G ] || exit 0; done\n'  # asked for its configuration
        f"cd {shlex.quote(str(TOP))} || exit 255\n"
        f"export BLKTRACK_ROOT={shlex.quote(str(folder / 'far-root'))}\n"
        f"exec {shlex.join(words)}\n"
    )
    new.chmod(0o755)
    new.rename(script)
    return str(script)


@pytest.fixture
def far(request: pytest.FixtureRequest, shared: Lab, monkeypatch: pytest.MonkeyPatch) -> FarSide:
    """By its parameter, here, pipe or ssh: see every_way."""
    net: NetLab | None = request.getfixturevalue("net") if request.param == "ssh" else None
    folder = shared.folder / "elsewhere"
    (folder / "replicas").mkdir(parents=True)
    side = FarSide(request.param, folder / "replicas", net)
    monkeypatch.setenv("BLKTRACK_SSH", side.serve())
    return side
