"""Replicas that are not as they were left, and the resync that mends them: one, and no more."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.capture import Source
from blktrack.extent import ExtentArray
from blktrack.tracker.tracking import Gap, Swap
from blktrack.units import KIB, MIB
from tests import sectors
from tests.background import assert_clear
from tests.blockdev import Lab, read_image, run, wait_until, write_direct
from tests.oracle import fill
from tests.test_sync import start

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 32 * MIB


class Pair:
    """A tracked source, and a replica file and a replica device that are in step with it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.source, self.file, self.device = lab.loop(SIZE), lab.name("replica"), lab.loop(SIZE)
        fill(self.source)
        lab.track(self.source)
        for target in (self.file, self.device):
            lab.sync(self.source, target)
        self._kept = lab.name("kept")

    def change(self, offset: int, number: int = 1) -> None:
        write_direct(self.source, offset, sectors.make(offset, 4 * KIB, number))

    def keep(self) -> None:
        shutil.copytree(f"{self.file}.blktrack", f"{self._kept}.blktrack")
        shutil.copy2(self.file, self._kept)

    def roll_back(self) -> None:
        """As a snapshot of the replica's file system that was restored would."""
        self.keep()
        self.change(MIB)
        self.lab.sync(self.source, self.file)
        self.restore()

    def restore(self) -> None:
        """As it was kept; the name leads to the same inode."""
        shutil.copytree(f"{self._kept}.blktrack", f"{self.file}.blktrack", dirs_exist_ok=True)
        shutil.copy2(self._kept, self.file)

    def write_file(self) -> None:
        with self.file.open("r+b") as replica:
            replica.seek(5 * MIB)
            replica.write(b"not ours")

    def write_device(self) -> None:
        write_direct(self.device, 5 * MIB, bytes(4 * KIB))

    def replace(self) -> None:
        """By a copy in which a block is another: the place is the same, the file is not."""
        other = self.lab.name("other")
        shutil.copy2(self.file, other)
        with other.open("r+b") as copy:
            copy.seek(9 * MIB)
            copy.write(bytes(4 * KIB))
        other.replace(self.file)

    def shorten(self) -> None:
        os.truncate(self.file, SIZE - MIB)


CASES: list[tuple[Callable[[Pair], None], str]] = [
    (Pair.roll_back, "not at the point that it was brought to"),
    (Pair.write_file, "it was written to by something else"),
    (Pair.write_device, "it was written to by something else"),
    (Pair.replace, "it was replaced"),
    (Pair.shorten, "its size went from"),
]


@pytest.mark.parametrize(("happen", "reason"), CASES, ids=[work.__name__ for work, _ in CASES])
def test_what_happens_to_a_replica_is_named_and_mended_by_one_resync(
    shared: Lab, happen: Callable[[Pair], None], reason: str
) -> None:
    pair = Pair(shared)
    target = pair.device if happen is Pair.write_device else str(pair.file)
    happen(pair)

    def told() -> dict[str, object]:
        links = shared.status(pair.source)["links"]
        (found,) = [link for link in links if link["target"] == target]
        return dict(found)

    found = told()
    assert found["state"] == "resync"
    assert reason in str(found["reason"])
    refused = shared.blktrack("sync", pair.source, target, "--no-resync")
    assert refused.code == 3
    assert reason in refused.err
    done = shared.sync(pair.source, target)
    assert done.mode == "resync"
    assert reason in done.reason
    assert not sectors.faults(read_image(pair.source), read_image(target))
    found = told()
    assert (found["state"], found["reason"]) == ("ready", "")
    assert len(found["resyncs"]) == 1  # type: ignore[arg-type]
    assert reason in str(found["resyncs"])
    pair.change(2 * MIB, 7)
    assert shared.sync(pair.source, target).mode == "incremental"
    assert not sectors.faults(read_image(pair.source), read_image(target))
    assert not shared.status(pair.source)["doubts"], "the source is beyond doubt"


def test_a_resync_goes_on_where_it_stopped(shared: Lab) -> None:
    """And what is written meanwhile is pending, in what was compared as in what was not."""
    pair = Pair(shared)
    for offset in (3 * MIB, 30 * MIB):
        with pair.file.open("r+b") as replica:
            replica.seek(offset)
            replica.write(bytes(4 * KIB))
    running = start(shared, "sync", pair.source, pair.file, "--limit", "3M")
    with pair.file.open("rb") as image:

        def mended() -> bool:
            return os.pread(image.fileno(), 512, 3 * MIB) != bytes(512)

        wait_until(mended, "the first of two differences to be mended")
    pair.change(MIB, 8)
    pair.change(31 * MIB, 9)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "resync" in err
    (link,) = [
        link for link in shared.status(pair.source)["links"] if link["target"] == str(pair.file)
    ]
    assert link["state"] == "resync"
    assert 0 < link["pending_bytes"] < SIZE
    done = shared.sync(pair.source, pair.file)
    assert done.mode == "resync"
    assert 0 < done.bytes_changed < SIZE - 2 * MIB
    assert done.bytes_shipped >= 8 * KIB
    assert not sectors.faults(read_image(pair.source), read_image(pair.file))
    assert shared.sync(pair.source, pair.file).mode == "nothing"


def test_a_resync_ships_what_differs_and_no_more(shared: Lab) -> None:
    pair = Pair(shared)
    run("dd", "if=/dev/zero", f"of={pair.device}", "bs=4k", "count=3", "seek=100", "oflag=direct")
    done = shared.sync(pair.source, pair.device)
    assert (done.mode, done.bytes_changed, done.bytes_shipped) == ("resync", SIZE, 12 * KIB)


def test_a_replica_that_is_gone_is_copied_anew(shared: Lab) -> None:
    pair = Pair(shared)
    pair.file.unlink()
    (link,) = [
        link for link in shared.status(pair.source)["links"] if link["target"] == str(pair.file)
    ]
    assert "it is gone" in link["reason"]
    done = shared.sync(pair.source, pair.file)
    assert (done.mode, done.reason) == ("initial", "the replica is new")
    assert Path(pair.file).stat().st_size == SIZE


def interrupted(lab: Lab, pair: Pair, begun: Callable[[], bool]) -> None:
    """A sync of the file that is told to end once it has begun to write."""
    running = start(lab, "sync", pair.source, pair.file, "--limit", "3M")
    wait_until(begun, "some of it to be shipped")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130


def test_a_replica_whose_disk_is_not_mounted_is_not_made_anew(shared: Lab) -> None:
    """Not without --force: it would fill the file system below the mount point."""
    source, disk = shared.loop(SIZE), shared.loop(3 * SIZE)
    run("mkfs.ext4", "-q", disk)
    fill(source)
    shared.track(source)
    with shared.mounted(disk) as point:
        replica = point / "replica"
        assert shared.sync(source, replica).mode == "initial"
    says = f"{replica} is gone, and nothing is mounted at {point}"
    for words in ((), ("--full",)):
        done = shared.blktrack("sync", source, replica, *words, "--quiet")
        assert_clear(done, 1, says, "mount it")
    assert not list(point.iterdir())
    run("mount", disk, point)
    try:
        assert shared.sync(source, replica).mode == "nothing"
    finally:
        run("umount", point)
    done = shared.blktrack("sync", source, replica, "--force", "--json")
    assert done.json["mode"] == "initial"
    assert shared.sync(source, replica).mode == "nothing"


def test_a_replica_that_went_back_from_the_middle_of_an_increment(shared: Lab) -> None:
    """What the sync had staged was dropped, and nothing of it forgotten."""
    pair = Pair(shared)
    pair.keep()
    for number in range(24):
        pair.change(number * MIB, number + 1)
        write_direct(pair.source, number * MIB + 64 * KIB, bytes(512 * KIB))
    staged = Path(f"{pair.file}.blktrack/incoming.pack")
    interrupted(shared, pair, staged.exists)
    assert not staged.exists()
    pair.restore()
    done = shared.sync(pair.source, pair.file)
    assert not sectors.faults(read_image(pair.source), read_image(pair.file))
    assert done.mode == "incremental"


def test_a_replica_that_went_back_from_the_middle_of_a_resync(shared: Lab) -> None:
    """It is at the very point of its link; what the sync had shipped is known nowhere else."""
    pair = Pair(shared)
    for number in range(0, 32, 4):
        pair.change(number * MIB, number + 1)
    pair.keep()
    with pair.file.open("r+b") as replica:
        replica.seek(30 * MIB)
        replica.write(bytes(4 * KIB))
    before = read_image(pair.file)
    interrupted(shared, pair, lambda: bool((read_image(pair.file) != before).any()))
    pair.restore()
    shared.sync(pair.source, pair.file)
    assert not sectors.faults(read_image(pair.source), read_image(pair.file))


def test_a_resync_that_has_not_ended_leaves_no_point(shared: Lab) -> None:
    """Whoever needs the data back must not be told of a point that the bytes have left."""
    pair = Pair(shared)
    for number in range(0, 32, 4):
        pair.change(number * MIB, number + 1)
    pair.write_file()
    before = read_image(pair.file)
    interrupted(shared, pair, lambda: bool((read_image(pair.file) != before).any()))
    told = [shared.status(pair.source)["links"]]
    top = shared.blktrack("top", "--once", "--json", "--interval", "0.1").json
    told += [found["links"] for found in top["devices"] if found["device"] == str(pair.source)]
    assert len(told) == 2
    for links in told:
        points = {link["target"]: (link["state"], link["point"] is None) for link in links}
        assert points == {str(pair.file): ("resync", True), str(pair.device): ("ready", False)}
    shared.sync(pair.source, pair.file)
    assert all(link["point"] for link in shared.status(pair.source)["links"])


def test_a_gap_in_a_first_copy_leaves_nothing_of_it_where_the_source_is_zero_by_then(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica was blank when the copy began, and is not when it begins anew."""
    source, replica = shared.loop(SIZE), shared.name("replica")
    fill(source)
    shared.track(source)
    judge = Source.is_valid

    def gap(self: Source, swap: Swap, extents: ExtentArray) -> bool:
        monkeypatch.setattr(Source, "is_valid", judge)
        write_direct(source, MIB, bytes(4 * MIB))
        raise Gap(f"{source}: a mark was lost")

    monkeypatch.setattr(Source, "is_valid", gap)
    shared.sync(source, replica)
    assert (read_image(replica) == read_image(source)).all()
