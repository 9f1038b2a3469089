"""Two hosts of the benchmark's own, a real sshd on the far one, and a link between them that is as
narrow and long as wanted. What crosses it is counted where it is shaped: bytes of TCP's streams,
both ways, whoever sends them."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blktrack.ship.ssh import VARIABLE
from tests import needs
from tests.lane import Shape
from tests.link import Counts, Link
from tests.netlab import NetLab
from tools.benchmark.figure import Run
from tools.benchmark.lab import BLKTRACK, Disk, Failed, timed

MBIT = 1e6 / 8  # bytes per second
_LOOK = 0.02  # seconds between two looks at the link
_BEGUN = 64 << 10  # bytes: more than a login and questions take


def shaped(mbit: float, round_trip_ms: float, *, stalls: float = 0.0) -> Shape:
    """`mbit` 0: without limit. Else the queue before the link holds a tenth of a second.

    stalls -- of 0.2 s, TCP's shortest pause after a loss, per second, at random.
    """
    return Shape(mbit * MBIT, round_trip_ms / 2000, int(mbit * MBIT / 10), stalls)


class Sample(NamedTuple):
    when: float  # time.monotonic()
    up: int  # bytes that had been sent to the far host by then


class Hosts:
    """Made by `two_hosts`."""

    def __init__(self, net: NetLab, link: Link) -> None:
        self._net = net
        self.link = link

    @property
    def ssh(self) -> list[str]:
        """An ssh of the near host, without the name of the far one."""
        return self._net.ssh_command(via=self.link)[:-1]

    @property
    def ssh_line(self) -> str:
        return shlex.join(self.ssh)

    @property
    def far(self) -> str:
        """Its name for that ssh."""
        return self.link.host

    def near(self, *command: str) -> tuple[str, ...]:
        """A command as it runs on the near host."""
        return (*self._net.near.prefix, *command)

    def url(self, path: Path) -> str:
        """The same for all shapes, so that a replica is always the same one."""
        return self._net.url(path, via=self.link)

    def command(self, source: Disk, replica: Path, *options: str) -> tuple[str, ...]:
        """`blktrack sync` as its user calls it."""
        return (BLKTRACK, "sync", source.path, self.url(replica), "--quiet", *options)

    def sync(self, source: Disk, replica: Path, *options: str) -> Run:
        return self.timed(*self.command(source, replica, *options))

    def timed(self, *command: str) -> Run:
        """Time of a command, and the bytes that crossed the link meanwhile."""
        before = self.link.counts()
        done = timed(*command)
        after = self.link.counts()
        up, down = after.up.taken - before.up.taken, after.down.taken - before.down.taken
        return {**done, "bytes": up + down, "up": up, "down": down}

    def sampled(self, *command: str) -> tuple[Run, list[Sample]]:
        """The same, and what had been sent when: from its first data on to its last."""
        samples: list[Sample] = []
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK):
                samples.append(Sample(time.monotonic(), self.link.counts().up.taken))

        before = self.link.counts()
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            done = timed(*command)
        finally:
            ended.set()
            watcher.join()
        return done, _busy(samples, before)


def _busy(samples: list[Sample], before: Counts) -> list[Sample]:
    first, last = before.up.taken + _BEGUN, samples[-1].up - _BEGUN
    busy = [sample for sample in samples if first <= sample.up <= last]
    if len(busy) < 2:
        raise Failed("nothing was seen on the link")
    return busy


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Gone on return, with all that runs on them."""
    if why := needs.netns() or needs.sshd():
        raise Failed(why)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    before = os.environ.get(VARIABLE)
    with NetLab({"PATH": path}) as net:
        net.sshd.allow(None)
        os.environ.update(net.environment)
        try:
            yield Hosts(net, net.link())
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
