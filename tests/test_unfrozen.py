"""A disk with a file system that can be frozen and one that cannot, as an EFI partition cannot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blktrack import capture, sync
from blktrack.capture import Source
from blktrack.errors import NoPoint
from blktrack.extent import ExtentArray
from blktrack.options import Options
from blktrack.quiesce.find import file_systems
from blktrack.report import SyncReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker.tracking import Swap
from blktrack.units import KIB, MIB
from tests import sectors
from tests.background import assert_clear
from tests.blockdev import Lab, Silent, read_image, run, write_direct
from tests.faultfs import FaultFile

pytestmark = pytest.mark.needs("root", "loop", "bpf", "ext4", "fuse")


class Disk:
    """Two partitions, both mounted; the whole is tracked, and has a replica in step with it."""

    def __init__(self, lab: Lab, fault: FaultFile, disk: str, firm: str, loose: str) -> None:
        self.lab, self.disk, self.loose, self.efi = lab, disk, loose, fault.mount
        self.root = lab.stack.enter_context(lab.mounted(firm))
        self.replica = str(lab.name("replica"))
        lab.track(disk)
        lab.sync(disk, self.replica)
        (self.root / "file").write_text("x")
        run("sync", "--file-system", self.root)

    def sync(self, **options: object) -> SyncReport:
        wanted = Options(**options)  # type: ignore[arg-type]
        return sync.sync(self.lab.store, self.disk, self.replica, wanted, Silent())[0]


@pytest.fixture
def disk(shared: Lab) -> Iterator[Disk]:
    path = shared.loop(96 * MIB)
    firm = shared.partition(path, 1, MIB, 64 * MIB)
    loose = shared.partition(path, 2, 66 * MIB, 16 * MIB)
    run("mkfs.ext4", "-q", firm)
    with FaultFile(shared.folder, MIB, device=loose) as fault, shared.fresh() as inner:
        yield Disk(inner, fault, path, firm, loose)


def racing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So many rounds seem to have been written to, and no more are taken before a freeze."""
    real, raced = Source.is_valid, iter([True] * times)

    def is_valid(source: Source, swap: Swap, extents: ExtentArray) -> bool:
        return not next(raced, False) and real(source, swap, extents)

    monkeypatch.setattr(Source, "is_valid", is_valid)
    monkeypatch.setattr(capture, "_MOST", times)


def test_both_are_listed(disk: Disk) -> None:
    found = file_systems(BlockDevice.find(disk.disk))
    assert [(one.kind, one.points) for one in found] == [
        ("fuseblk", (disk.efi,)),
        ("ext4", (disk.root,)),
    ]


def test_a_point_of_the_file_system_is_refused(disk: Disk) -> None:
    before = read_image(disk.replica)
    done = disk.lab.blktrack("sync", disk.disk, disk.replica, "--consistency", "filesystem")
    assert_clear(
        done,
        1,
        f"the fuseblk at {disk.efi} cannot be frozen",
        f"--pre-freeze 'mount -o remount,ro {disk.efi}'",
        f"--post-freeze 'mount -o remount,rw {disk.efi}'",
    )
    assert (read_image(disk.replica) == before).all()
    (disk.root / "file").write_text("it is thawed")


def test_read_only_for_that_long_it_is_one(disk: Disk) -> None:
    """As the hint says."""
    hooks = [
        *("--pre-freeze", f"mount -i -o remount,ro {disk.efi}"),
        *("--post-freeze", f"mount -i -o remount,rw {disk.efi}"),
    ]
    words = ["sync", disk.disk, disk.replica, "--consistency", "filesystem", "--json"]
    done = disk.lab.blktrack(*words, *hooks)
    assert done.json["consistency"] == "filesystem"
    assert done.json["freeze_s"] > 0
    assert done.err == ""
    assert len(file_systems(BlockDevice.find(disk.disk))) == 2, "it is writable again"


def test_a_crash_point_is_had_by_freezing_the_other(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is called no more than that."""
    racing(monkeypatch, 1)
    report = disk.sync()
    assert (report.consistency, report.rounds) == ("crash", 2)
    assert report.freeze_s > 0
    assert disk.lab.status(disk.disk)["links"][0]["consistency"] == "crash"


def test_what_is_not_frozen_may_spoil_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes while the last round is read."""
    before, real = read_image(disk.replica), Source.is_valid

    def is_valid(source: Source, swap: Swap, extents: ExtentArray) -> bool:
        for number in (1, 2):
            write_direct(disk.loose, 0, sectors.make(MIB, 4 * KIB, number))
        return real(source, swap, extents)

    monkeypatch.setattr(Source, "is_valid", is_valid)
    monkeypatch.setattr(capture, "_MOST", 2)
    write_direct(disk.loose, 0, sectors.make(MIB, 4 * KIB, 0))
    with pytest.raises(NoPoint, match=f"cannot be frozen: the fuseblk at {disk.efi}"):
        disk.sync()
    assert (read_image(disk.replica) == before).all()
