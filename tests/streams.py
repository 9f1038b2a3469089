"""A source that sends deltas and a receiver of another root, as on two hosts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from blktrack import send
from blktrack.config import Paths
from blktrack.options import Options
from blktrack.report import RecvReport, ReplicaStatus, SendReport
from blktrack.ship.receive import receive
from blktrack.ship.tell import replica_status
from blktrack.units import MIB
from tests import sectors
from tests.blockdev import TOP, Done, Lab, Silent, read_image, write_direct
from tests.oracle import fill

LINK = "far"
SIZE = 16 * MIB


class Hosts:
    """`source` is tracked and is sent by `link`; `target` is on the other host."""

    def __init__(self, lab: Lab, size: int, *, target: str | Path | None = None) -> None:
        self.lab, self.size, self.link = lab, size, LINK
        self.source = lab.loop(size)
        fill(self.source)
        lab.track(self.source)
        self.root = lab.name("far")
        self.target = Path(target or lab.name("replica"))

    def change(self, offset: int, length: int = 64 << 10, number: int = 1) -> None:
        write_direct(self.source, offset, sectors.make(offset, length, number))

    def send(self, *words: str, env: Mapping[str, str] | None = None) -> tuple[bytes, Done]:
        """The delta, and what was said of it, as JSON."""
        done = command(
            "send", self.source, "--link", self.link, "--quiet", "--json", *words, env=env or {}
        )
        return done.stdout, Done(done.returncode, done.stderr.decode(), done.stderr.decode())

    def sent(self, options: Options | None = None) -> tuple[bytes, SendReport]:
        """The same in this process."""
        file = io.BytesIO()
        report = send.send(
            self.lab.store,
            self.source,
            self.link,
            file,
            options=options or Options(),
            observer=Silent(),
        )
        return file.getvalue(), report

    def recv(
        self,
        delta: bytes,
        *words: str,
        target: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """On a host that has neither bcc nor rich."""
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.modules.update(bcc=None, rich=None)\n"
                "from blktrack.cli import main; sys.exit(main())",
                "recv",
                str(target or self.target),
                "--json",
                *words,
            ],
            input=delta,
            capture_output=True,
            check=False,
            cwd=TOP,
            timeout=120,
            env={**os.environ, **self.there, **(env or {})},
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def received(self, delta: bytes) -> RecvReport:
        """The same in this process."""
        return receive(io.BytesIO(delta), str(self.target), self.paths)

    @property
    def there(self) -> dict[str, str]:
        """The environment of the other host."""
        return {"BLKTRACK_ROOT": str(self.root)}

    @property
    def paths(self) -> Paths:
        return Paths.below(self.root)

    def commit(self, epoch: int) -> None:
        send.commit(self.lab.store, self.source, self.link, epoch)

    def carry(self, options: Options | None = None) -> SendReport:
        """Send, receive and commit."""
        delta, report = self.sent(options)
        assert self.received(delta).epoch == report.epoch
        self.commit(report.epoch)
        return report

    def replica(self) -> ReplicaStatus:
        """What the replica says of itself."""
        found = replica_status(str(self.target), self.paths)
        assert found is not None
        return found

    def identical(self) -> bool:
        there = read_image(self.target)[: self.size]
        return not sectors.faults(read_image(self.source), there)


def command(
    *words: str | Path, env: Mapping[str, str], stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "blktrack", *(str(word) for word in words)],
        input=stdin,
        capture_output=True,
        check=False,
        cwd=TOP,
        timeout=120,
        env={**os.environ, **env},
    )


@pytest.fixture
def hosts(shared: Lab) -> Hosts:
    """With a replica in step."""
    made = Hosts(shared, SIZE)
    assert made.carry().mode == "initial"
    return made
