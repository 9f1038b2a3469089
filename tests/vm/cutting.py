"""What a machine whose power will be cut is made of, seen from inside: disks, writers, the cut."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

from blktrack import crash
from blktrack.linux import Buffer
from blktrack.ship.aio import RequestQueue
from blktrack.ship.endpoint import Endpoint
from blktrack.ship.plan import Piece
from tests import chains
from tests.blockdev import run, wait_until
from tests.vm import disks
from tests.vm.power import CHAINS, CUT, SIZE, Job, Writes

PACE = 0.05  # seconds between two writes to a source
HOME, XFS = Path("/srv/home"), Path("/srv/xfs")  # HOME has what blktrack keeps over a boot, too


def named(serial: str) -> str:
    """A name of a disk that stays, as udev would make it: that of NVMe disks changes by boots."""
    link = Path("/dev/disk/by-id") / serial
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(disks.find(serial))
    return str(link)


def mount(replicas: Collection[str]) -> None:
    """What the machine has beside its sources."""
    kept = Path("/var/lib/blktrack")
    for serial, point in (("home", HOME), *([("xfs", XFS)] if "xfs" in replicas else [])):
        point.mkdir(parents=True, exist_ok=True)
        run("mount", disks.find(serial), point)
    (HOME / "lib").mkdir(exist_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    run("mount", "--bind", HOME / "lib", kept)


def assemble(sources: Collection[str], *, first: bool) -> dict[str, str]:
    """The devices of the sources, made in the first boot and found again in others."""
    makers = {
        "virtio-blk": lambda _: named("blk"),
        "nvme-4096": lambda _: named("nvme4k"),
        "lvm-linear": volume,
        "md-raid1": mirror,
    }
    return {source: makers[source](first) for source in sources}


def volume(first: bool) -> str:
    run("modprobe", "dm-mod")
    parts = [disks.find(f"pv{number}") for number in (1, 2)]
    if first:
        run("vgcreate", "-q", "vg", *parts)
        run("lvcreate", "-q", "-y", "-W", "n", "-n", "lv", "-L", f"{SIZE}b", "vg")
    else:
        run("vgchange", "-q", "-ay", "vg")
    return there("/dev/mapper/vg-lv")


def mirror(first: bool) -> str:
    """Whether its halves are the same after a cut nothing says, so md compares them."""
    run("modprobe", "raid1")
    node, members = "/dev/md100", [disks.find(f"md{number}") for number in (1, 2)]
    if first:
        run(
            "mdadm", "--create", node, "--run", "--quiet", "--metadata=1.2", "--level=1",
            f"--size={SIZE >> 10}", "--raid-devices=2", "--bitmap=none", "--assume-clean", *members,
        )  # fmt: skip
    else:
        run("mdadm", "--assemble", "--run", "--quiet", node, *members)
    return there(node)


def there(node: str) -> str:
    wait_until(Path(node).exists, node)
    return node


class Writer:
    """Writes its chains in turn, each write begun when the one before it has ended."""

    def __init__(self, path: str, log: Writes) -> None:
        self._path, self._log = path, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.count = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        numbers = [self._log.last(chain) for chain in range(CHAINS)]
        fd = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
        memory = mmap.mmap(-1, chains.BLOCK)
        try:
            while not self._stop.wait(PACE):
                chain = self.count % CHAINS
                place = chains.stamp(memory, chain, numbers[chain])
                self._log.begins(chain, numbers[chain])
                os.pwrite(fd, memory, place)
                numbers[chain] += 1
                self.count += 1
        finally:
            os.close(fd)


class Cut:
    """Says when the power is to be cut, and holds what is to be cut if that is asked for."""

    def __init__(self, share: Path, job: Job) -> None:
        self._share, self._job = share, job
        self._armed = False
        self._applying = False
        crash.point = self._point
        self._write_many = Endpoint.write_many
        cut = self

        def write_many(
            self: Endpoint, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
        ) -> None:
            cut._written(self, pieces, buffer, requests)

        Endpoint.write_many = write_many  # type: ignore[method-assign]

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        self._armed = True
        try:
            yield
        finally:
            self._armed = self._applying = False

    def _point(self, name: str) -> None:
        if not self._armed:
            return
        self._applying = name == "apply-recorded" or (self._applying and name == "apply-resized")
        if name == self._job.at:
            self.now()

    def _written(
        self, end: Endpoint, pieces: list[Piece], buffer: Buffer, requests: RequestQueue | None
    ) -> None:
        """At "apply-half" the cut is in the middle of what is applied."""
        if self._applying and self._job.at == "apply-half" and len(pieces) > 1:
            self._write_many(end, pieces[: len(pieces) // 2], buffer, requests)
            self.now()
            self._write_many(end, pieces[len(pieces) // 2 :], buffer, requests)
        else:
            self._write_many(end, pieces, buffer, requests)

    def now(self) -> None:
        (self._share / CUT).touch()
        if self._job.hold:
            self.await_it()

    def await_it(self) -> NoReturn:
        while True:
            time.sleep(60)
