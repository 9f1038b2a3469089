"""A power cut of a disk with a volatile cache leaves a replica at a point: the last or the next.

The write log of the replica's own disk is replayed up to a cut. What came before the last flush is
there; of what came after it any part, sector by sector, whatever came first. The file system is
mounted here, and the replica finished by what any next command would do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blktrack.config import Paths
from blktrack.errors import BlktrackError
from blktrack.ship.apply import finish, settle
from blktrack.ship.claim import take
from blktrack.ship.place import RECORD, Place, lock_of
from blktrack.ship.record import Record, State
from blktrack.ship.target import Target
from blktrack.units import MIB, SECTOR
from tests.blockdev import detach, read_image, run, told, wait_until
from tests.needs import TOOL_PATH
from tests.vm.publisher import CASES, END, MARK, Told, parts
from tests.vm.writelog import FLUSH, Entry, WriteLog, digests
from tools.vm import kernels, packages
from tools.vm.disk import Disk
from tools.vm.machine import Machine

pytestmark = [
    pytest.mark.needs("root", "loop", "ext4", "xfs", "qemu-system-x86_64", "depmod"),
    pytest.mark.timeout(1800),
]

CUTS = 20 * int(os.environ.get("BLKTRACK_SOAK") or 1)  # of each case
SOURCE = 8 * MIB
# None with FUA, which no log tells (writelog.py). A file system of xfs has 300 MiB at least.
DISKS = {
    "ext4": ("virtio-blk", 64 * MIB),
    "xfs": ("virtio-scsi", 322 * MIB),
    "device": ("virtio-blk", 40 * MIB),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="blktrack-caches-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


def test_replica_outlives_a_volatile_cache(kernel: str, seed: int, folder: Path) -> None:
    source = Disk("src", folder / "src.img")
    source.create(SOURCE)
    made = [source]
    for case, (kind, size) in DISKS.items():
        made.append(Disk(case, folder / f"{case}.img", kind, log=folder / f"{case}.log"))
        made[-1].create(size)
    layer = packages.guest_layer()
    with Machine(kernels.kernel(kernel), layer, folder, made, memory=1024) as machine:
        machine.start(f"{sys.executable} -B -m tests.vm.publisher {seed}")
        code = machine.wait(1500)
        assert code == 0, machine.tail()
    about = json.loads((folder / "share/told.json").read_text(encoding="ascii"))
    for case in CASES:
        found = Cuts(folder, case, Told(*about[case]), seed).check()
        told(f"{kernel}, {case}: {found}")


def test_a_torn_superblock_is_mended(folder: Path) -> None:
    """And what has no superblock any more is not taken for one that is torn."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", image)
    assert not tear_mended(str(image))
    with image.open("r+b") as file:
        file.seek(1024)
        first = bytearray(file.read(512))
        first[0x10] ^= 1  # free inodes, of a later superblock than the second sector's
        file.seek(1024)
        file.write(first)
    assert tear_mended(str(image))
    run("e2fsck", "-f", "-n", image)
    with image.open("r+b") as file:
        file.write(bytes(MIB))
    with pytest.raises(AssertionError, match=r"[Bb]ad magic"):
        tear_mended(str(image))


class Cuts:
    def __init__(self, folder: Path, case: str, about: Told, seed: int) -> None:
        self.folder, self.case, self.about = folder, case, about
        self.log = WriteLog(folder / f"{case}.log")
        self.size = DISKS[case][1]
        self.random = random.Random(seed)
        self.points = [np.load(folder / f"share/{case}-{n}.npy") for n in range(len(about.epochs))]
        self.marks = {
            int(self.log.data(entry).view(np.uint64)[1]): number
            for number, entry in enumerate(self.log.entries)
            if entry.start == self.size - END and self.log.data(entry).view(np.uint64)[0] == MARK
        }
        assert sorted(self.marks) == list(range(len(self.points)))
        self.torn = 0

    def check(self) -> str:
        base = np.memmap(self._blank("base.img"), dtype=np.uint8, mode="r+")
        cuts = self._cuts()
        done, found, risked = 0, Counter[str](), 0
        for cut in cuts:
            flushes = [n for n in range(done, cut) if self.log.entries[n].flags & FLUSH]
            durable = flushes[-1] if flushes else done
            self.log.replay(base, done, durable)
            done = durable
            image = self.folder / "cut.img"
            # Holes stay holes: most of a disk is.
            run("cp", "--sparse=always", self.folder / "base.img", image)
            risk = [each for each in self.log.entries[durable:cut] if each.is_change]
            how = self._lose(image, risk)
            risked += len(risk)
            last = max(number for number, at in self.marks.items() if at < cut)
            what = f"{self.case}, cut at entry {cut}, after the flush {durable}, {how}"
            at = self._point(image, what)
            assert last <= at <= last + 1, f"{what}: at point {at}, though {last} was reported"
            found["new" if at > last else "old"] += 1
        torn = f", {self.torn} superblocks torn" * bool(self.torn)
        return f"{len(cuts)} cuts, {risked} writes at risk in them, {dict(found)}{torn}"

    def _cuts(self) -> list[int]:
        """Anywhere after the first point; rather where much would be lost."""
        places, weights, risk = [], [], 0
        for number, entry in enumerate(self.log.entries, 1):
            risk = 0 if entry.flags & FLUSH else risk + 1
            if number > self.marks[0]:
                places.append(number)
                weights.append(1 + 4 * risk)
        return sorted(self.random.choices(places, weights, k=CUTS))

    def _blank(self, name: str) -> Path:
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(self.size)
        return path

    def _lose(self, image: Path, risk: list[Entry]) -> str:
        """Write what of `risk` reached the medium; says how it was chosen."""
        share = self.random.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        torn = self.random.random() < 0.5
        with image.open("r+b") as file:
            for entry in risk:
                data = self.log.data(entry)
                step = SECTOR if torn else entry.length
                for at in range(0, entry.length, step):
                    if self.random.random() < share:
                        file.seek(entry.start + at)
                        file.write(data[at : at + step].tobytes())
        return f"{share} of {len(risk)} writes{', sector by sector' * torn}"

    def _point(self, image: Path, what: str) -> int:
        """At which point the replica comes back. AssertionError if it is at none."""
        with contextlib.ExitStack() as held:
            nodes = [attached(held, image, *part) for part in parts(self.case, self.size)]
            point = self.folder / "mount"
            point.mkdir(exist_ok=True)
            if self.case != "xfs" and tear_mended(nodes[0]):
                self.torn += 1
            run("mount", nodes[0], point)
            held.callback(run, "umount", point)
            paths = Paths.below(self.folder / "root")
            state = point / self.about.folder
            target = nodes[1] if self.case == "device" else str(point / "replica.img")
            try:
                if self.case == "device":
                    record = finished_device(target, state, paths)
                else:
                    record = finish(target, paths)
            except BlktrackError as error:
                pytest.fail(f"{what}: {error}")
            assert record and record.point and record.state is State.READY, f"{what}: {record}"
            number = self.about.epochs.index(record.point.epoch)
            wrong = np.flatnonzero(digests(read_image(target)[:SOURCE]) != self.points[number])
            assert not len(wrong), f"{what}: {len(wrong)} sectors are not of point {number}"
            return number


def tear_mended(node: str) -> bool:
    """Do what a boot does where ext4 itself cannot: its superblock is two sectors, whose checksum
    it sees before it replays its journal (ext4_init_metadata_csum, fs/ext4/super.c)."""

    def tool(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": TOOL_PATH}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    if not tool("dumpe2fs", "-h", node).returncode:
        return False
    done = tool("e2fsck", "-y", node)
    assert "Superblock checksum does not match superblock" in done.stdout, done
    assert done.returncode == 1, done  # all was corrected
    return True


def attached(held: contextlib.ExitStack, image: Path, start: int, length: int) -> str:
    places = ["--offset", str(start), "--sizelimit", str(length)]
    node = run("losetup", "--find", "--show", *places, image)
    held.callback(detach, node, image)
    wait_until(lambda: Path(node).exists(), node)
    return node


def finished_device(device: str, state: Path, paths: Paths) -> Record | None:
    """As `finish`, for a device that has another name here than where it was made a replica."""
    target = Target.find(device)
    with contextlib.ExitStack() as held:
        end, _ = take(target, lock_of(state, paths), held, size=0, writable=True)
        place = Place(target, end, state)
        place.record = Record.read(state / RECORD)
        assert place.record
        settle(place, place.changed(place.record))
        return place.record
