"""The disk that the running system is on: blktrack's own files are among what changes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blktrack import linux, sync
from blktrack.config import Paths
from blktrack.errors import NoPoint
from blktrack.options import Options
from blktrack.report import SyncReport
from tests.blockdev import Lab, Silent, Watch, read_image, run
from tests.oracle import missed, repeating
from tests.sectors import Image
from tests.vm import disks
from tests.workload import FileMix, trim_mounted
from tools.vm.initramfs import DISK_ROOT

pytestmark = [
    pytest.mark.needs("root", "bpf", "ext4"),
    pytest.mark.timeout(600),
]
STATE = Path("/var/lib/blktrack")


@pytest.fixture
def host(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """The instance of the host itself."""
    monkeypatch.delenv("BLKTRACK_ROOT")
    yield Lab(lab.folder, lab.stack)
    lab.blktrack("untrack", disks.find("root"))


def image(disk: str) -> Image:
    """As it is between two writes of its file system. Who writes a file meanwhile, waits."""
    fd = os.open(DISK_ROOT, os.O_RDONLY)
    try:
        linux.freeze(fd)
        try:
            return read_image(disk)
        finally:
            linux.thaw(fd)
    finally:
        os.close(fd)


def test_root_file_system(
    host: Lab, seed: int, record_property: Callable[[str, object], None]
) -> None:
    disk, target = disks.find("root"), host.folder / "replica"
    assert host.store.paths == Paths.of_host()
    assert host.blktrack("track", disk).code == 0
    assert Path(f"{DISK_ROOT}/upper{STATE}").is_dir()
    assert host.blktrack("sync", disk, target, "--json").json["mode"] == "initial"
    watch = Watch(host.store, disk)
    watch.take()
    before = image(disk)
    reports = list[SyncReport]()

    def synced() -> None:
        with contextlib.suppress(NoPoint):  # an emulated processor may be too slow
            reports.append(sync.sync(host.store, disk, str(target), Options(), Silent())[0])

    with repeating(synced):
        FileMix(Path("/var/tmp"), seed).run(60)
        trim_mounted(Path(DISK_ROOT))
    synced()
    assert {report.mode for report in reports} == {"incremental"}
    assert {report.consistency for report in reports} <= {"crash", "filesystem"}
    after, look = image(disk), watch.look()
    lost = missed(before, after, look.drained)
    assert not len(lost), f"{len(lost)} sectors changed untracked, first {lost[:8]}"
    assert not any(look.losses.values()), look.losses

    crashed = shutil.copy(target, host.folder / "crashed")
    run("e2fsck", "-p", crashed)  # its journal, and then nothing to repair: that would be code 1
    report = host.blktrack("sync", disk, target, "--consistency", "filesystem", "--json").json
    assert report["consistency"] == "filesystem"
    run("e2fsck", "-f", "-n", target)
    state = Path(f"upper{STATE}/devices")
    with host.mounted(str(target), "-o", "ro,noload") as point:
        assert sorted(os.listdir(point / state)) == sorted(os.listdir(STATE / "devices"))
    record_property(
        "measured", f"root file system: {len(reports)} syncs, {len(after) >> 20} MiB, none lost"
    )
