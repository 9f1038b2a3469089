"""The source's host loses its power at random moments, and boots again on the same disks.

One machine a kernel has four sources, each with a replica of another kind, and is cut off again and
again: in a phase that is waited for, and a random moment after that.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blktrack.config import Paths
from blktrack.units import MIB
from tests.blockdev import run, told, wait_until
from tests.netlab import NetLab
from tests.vm.machines import KERNELS
from tests.vm.power import CUT, FAR, REPLICAS, SIZE, SOURCES, Events, Job, look
from tools.vm import kernels, packages
from tools.vm.disk import Disk
from tools.vm.initramfs import SHARE
from tools.vm.machine import Machine

pytestmark = [
    pytest.mark.needs("root", "qemu-system-x86_64", "depmod", "ext4", "xfs", "netns", "sshd"),
    pytest.mark.timeout(1800),
]

CUTS = 5  # of a machine
LIMIT = 600.0  # seconds from a boot to its cut
MOMENT = 0.15  # seconds, at most, from the phase to the cut


@dataclass(frozen=True)
class Phase:
    when: str
    here: tuple[str, ...] = ("",)  # crash points of the syncs of a replica in the machine
    there: tuple[str, ...] = ()  # and of one on another host; (): as here
    busy: bool = False
    hold: bool | None = None  # None: as it falls out

    def points(self, replica: str) -> tuple[str, ...]:
        return self.there if self.there and replica == "ssh" else self.here


FIRST = Phase("first", ("ship-begun", "copy-flushed"), ("ship-begun",))  # the initial copies
PHASES = (
    Phase("first", ("ship-begun",), busy=True, hold=False),  # a resync
    Phase("later", ("stage-created", "stage-flushed", "stage-listed"), ("stage-recorded",)),
    Phase("later", ("stage-sealed",), ("sealing-recorded",), hold=True),
    Phase("later", ("apply-recorded", "apply-half", "apply-half"), ("sealing-recorded",)),
    Phase("later", ("apply-copied", "commit-flushed"), ("commit-replica",), hold=True),
    Phase(
        "later",
        ("apply-done", "commit-replica", "commit-link", "commit-sets"),
        ("commit-replica", "commit-link", "commit-sets"),
    ),
    Phase("idle"),
)
STOPPING = (Phase("stop", ("stop-kept", "stop-described", "stop-recorded"), hold=True),)
STOPPED = (Phase("stop"), Phase("foreign"))
LAST = Phase("last")  # to see what the cut before has left


class Site:
    """The machine, its disks, and the host that one of the replicas is on."""

    def __init__(self, kernel: str, folder: Path, net: NetLab) -> None:
        self.net = net
        data = random.Random(0).randbytes(SIZE + 4 * MIB)
        disks = []
        for serial, kind, sector, size in (
            ("home", "virtio-blk", 512, 128 * MIB),
            ("xfs", "virtio-blk", 512, 384 * MIB),
            ("blk", "virtio-blk", 512, SIZE),
            ("nvme4k", "nvme", 4096, SIZE),
            ("pv1", "virtio-blk", 512, SIZE),
            ("pv2", "virtio-blk", 512, SIZE),
            ("md1", "virtio-blk", 512, SIZE + 4 * MIB),
            ("md2", "virtio-blk", 512, SIZE + 4 * MIB),
            ("target", "nvme", 512, SIZE + 8 * MIB),
        ):
            disk = Disk(serial, folder / f"{serial}.img", kind, sector)
            disk.create(size)
            if size <= len(data) and serial != "target":  # both halves of a mirror are the same
                disk.image.write_bytes(data[:size])
            disks.append(disk)
        run("mkfs.ext4", "-q", "-F", disks[0].image)
        run("mkfs.xfs", "-q", disks[1].image)
        self.machine = Machine(
            kernels.kernel(kernel),
            packages.guest_layer(),
            folder / "machine",
            disks,
            network=net.near.prefix,
        )
        self.share = self.machine.share
        self.far = self.share / FAR
        self.far.mkdir(parents=True)
        self.far_paths = Paths.below(net.folder / "far-root")
        net.sshd.allow([sys.executable, "-m", "blktrack", "recv", "--serve"])
        self._client = self._keys()

    def _keys(self) -> str:
        """For the ssh inside, which does not see the folder of the lab."""
        config = Path(self.net.sshd.client().split()[-1])
        inside = Path(SHARE) / "ssh"
        (self.share / "ssh").mkdir()
        for path in (config, config.with_name(f"{config.name}.known_hosts"),
                     config.with_name("client_key")):  # fmt: skip
            copy = self.share / "ssh" / path.name
            copy.write_text(path.read_text().replace(str(config.parent), str(inside)))
            copy.chmod(0o600)
        return f"ssh -F {inside / config.name}"

    def cut(self, job: Job, delay: float) -> None:
        """From a boot to the loss of power, and to the end of who served it elsewhere."""
        (self.share / CUT).unlink(missing_ok=True)
        job.write(self.share)
        words = [sys.executable, "-B", "-m", "tests.vm.powered"]
        self.machine.start(" ".join(words), {"BLKTRACK_SSH": self._client})
        self.machine.until(CUT, LIMIT)
        time.sleep(delay)
        assert self.machine.running, self.machine.tail()
        self.machine.kill()
        wait_until(lambda: not self.net.sshd.commands(), "the end of the keeper", 60)

    def look(self, job: Job) -> None:
        """At the replica that is elsewhere."""
        source = next((each for each, kind in job.replicas.items() if kind == "ssh"), "")
        if not source:
            return
        target = self.far / f"{source}.img"
        found = look(str(target), self.far_paths, source, self.share, job.boot)
        Events(self.share).add(job.boot + 1, "found", source, state=found.state)
        assert not found.fault, f"{source} at {target}: {found}"


@contextmanager
def site(kernel: str, folder: Path) -> Iterator[Site]:
    with NetLab() as net:
        made = Site(kernel, folder, net)
        with made.machine:
            yield made


def jobs(kernel: str, sources: Sequence[str], far: str, chance: random.Random) -> Iterator[Job]:
    """CUTS, and a boot more to see what the last has left. Half of the phases are for each half of
    the sources, and the other half with the next kernel."""
    turn = KERNELS.index(kernel)
    half = 0 if sources == SOURCES["disks"] else 1
    kinds = REPLICAS[turn:] + REPLICAS[:turn]
    replicas = dict(zip(sources, kinds[2 * half :], strict=False))
    odd = (turn + half) % 2
    ends = STOPPED if odd else STOPPING
    some = chance.sample(PHASES[odd::2], CUTS - 1 - len(ends))
    phases = [FIRST, *some, *ends, LAST]
    for number, phase in enumerate(phases):
        source = sources[(number + turn) % len(sources)]
        at = chance.choice(phase.points(replicas[source]))
        hold = chance.random() < 0.5 if phase.hold is None else phase.hold
        yield Job(number + 1, replicas, far, source, phase.when, at, hold, phase.busy)


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES.keys())
def test_power_cuts(
    kernel: str,
    sources: Sequence[str],
    seed: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(f"{seed} {kernel} {sources}")
    with site(kernel, tmp_path) as made:
        cuts = list(jobs(kernel, sources, made.net.url(made.far), chance))
        for job in cuts:
            delay = chance.uniform(0, MOMENT)
            begin = time.monotonic()
            made.cut(job, delay)
            took = time.monotonic() - begin
            told(
                f"{kernel}: {job.source} to {job.replicas[job.source]}, {job.when} {job.at} "
                f"{'held' if job.hold else ''}+{delay:.3f} s, {took:.0f} s"
            )
            made.look(job)
        found = Events(made.share).all()
    states = Counter(each["state"] for each in found if each["kind"] == "found")
    starts = Counter(each["action"] for each in found if each["kind"] == "start")
    modes = Counter(each["mode"] for each in found if each["kind"] == "end")
    record_property(
        "measured",
        f"{len(cuts) - 1} power cuts; replicas found {counts(states)}; devices {counts(starts)}; "
        f"syncs {counts(modes)}",
    )


def counts(of: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(of.items()))
