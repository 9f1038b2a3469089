"""Which devices are refused as a source, from what sysfs says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blktrack.device import bypasses_bios, check, device_id
from blktrack.errors import Refused
from blktrack.sysfs import BlockDevice


def made(folder: Path, name: str = "sdx", **files: str) -> BlockDevice:
    """A disk as sysfs shows one; `queue__zoned="none"` is the file queue/zoned."""
    defaults = {"size": "2048", "dev": "8:16", "queue__logical_block_size": "512"}
    for key, text in (defaults | files).items():
        path = folder / name / key.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return BlockDevice(f"/dev/{name}", name, folder / name, (8, 16))


def test_an_ordinary_disk_is_taken(tmp_path: Path) -> None:
    check(made(tmp_path, queue__zoned="none", queue__dax="0"))
    check(made(tmp_path))  # an older kernel tells neither


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"queue__zoned": "host-managed"}, "host-managed zoned"),
        ({"queue__zoned": "host-aware"}, "host-aware zoned"),
        ({"queue__dax": "1"}, "DAX"),
        ({"size": "0"}, "no medium"),
    ],
)
def test_what_could_change_unseen_is_refused(
    tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    with pytest.raises(Refused) as refusal:
        check(made(tmp_path, **files))
    assert "/dev/sdx" in str(refusal.value)
    assert reason in str(refusal.value)
    assert refusal.value.hint
    assert refusal.value.exit_code == 1


def test_a_multipath_head_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "devices/virtual/nvme-subsystem/nvme-subsys0"
    with pytest.raises(Refused, match="multipath head"):
        check(made(folder, "nvme0n1"))


def test_a_device_is_known_by_its_permanent_name(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    one = made(before, "sdx", serial="S1234", diskseq="5")
    assert device_id(one) == device_id(made(after, "sdy", serial="S1234", diskseq="9"))
    assert device_id(one) != device_id(made(after, "sdz", serial="S9999", diskseq="5"))
    # Without one, it is its kernel name, and what tells it apart is checked at each command.
    assert device_id(made(before, "zram7")) == device_id(made(after, "zram7"))


def test_drivers_that_had_rw_page(tmp_path: Path) -> None:
    assert bypasses_bios(made(tmp_path, "zram0"))
    assert bypasses_bios(made(tmp_path, "pmem1"))
    assert not bypasses_bios(made(tmp_path, "sda"))
