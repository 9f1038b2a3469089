"""Device-mapper tables: which change of one may bring other data, and what is remembered of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from blktrack import mapper
from blktrack.errors import BlktrackError
from blktrack.mapper import Target
from blktrack.sysfs import BlockDevice

KEY = "00112233445566778899aabbccddeeff"
Lines = tuple[str, ...]
LINEAR = ("0 8 linear 8:16 2048",)
DELAY = ("0 8 delay 8:16 0 0 8:32 0 0 8:48 0 0",)
# As multipath_status prints them: features, handler, groups, next group, paths with their failures.
PATHS = ("0 8 multipath 1 queue_if_no_path 0 1 1 round-robin 0 2 1 8:16 1 8:32 1",)


def lines(*table: str) -> list[str]:
    """As dmsetup prints a table."""
    words = (line.split(" ", 3) for line in table)
    return mapper.lines(Target(int(start), int(length), *rest) for start, length, *rest in words)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (LINEAR, LINEAR),
        (LINEAR, ("0 16 linear 8:16 2048",)),
        (LINEAR, (*LINEAR, "8 8 linear 8:32 0", "16 8 linear 8:32 4096")),
        (LINEAR, ("0 12 linear 8:16 2048", "12 8 linear 8:32 0")),
        (DELAY, ("0 8 delay 8:16 0 5 8:32 0 7 8:48 0 9",)),
        (
            PATHS,
            ("0 8 multipath 0 1 alua 2 2 queue-length 0 1 1 8:64 1 queue-length 0 1 1 8:32 1",),
        ),
        (
            ("0 8 integrity 8:16 0 32 J 2 recalculate journal_sectors:88",),
            ("0 8 integrity 8:16 0 32 J 1 recalculate journal_sectors:88",),
        ),
        ((), ()),
    ],
)
def test_the_same_data(before: Lines, now: Lines) -> None:
    assert mapper.goes_on(lines(*before), lines(*now))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (LINEAR, ("0 8 linear 8:32 2048",)),
        (LINEAR, ("0 8 linear 8:16 4096",)),
        (LINEAR, ("0 8 snapshot-merge 253:3 253:4 P 16",)),
        (LINEAR, ("0 8 striped 1 16 8:16 2048",)),
        (LINEAR, ("0 4 linear 8:16 2048",)),
        (LINEAR, ("0 4 linear 8:16 2048", "4 4 linear 8:16 2052")),
        (LINEAR, ()),
        ((*LINEAR, "8 8 linear 8:32 0"), LINEAR),
        ((*LINEAR, "8 8 linear 8:32 0"), ("0 9 linear 8:16 2048", "9 7 linear 8:32 0")),
        (DELAY, ("0 8 delay 8:16 0 0 8:64 0 0 8:48 0 0",)),
        (PATHS, ("0 8 multipath 1 queue_if_no_path 0 1 1 round-robin 0 1 1 8:48 1",)),
        (PATHS, ("0 8 multipath 1 queue_if_no_path 0 0 0",)),
        ((f"0 8 crypt aes {KEY} 0 8:16 0",), (f"0 8 crypt aes {KEY[::-1]} 0 8:16 0",)),
    ],
)
def test_data_that_may_be_others(before: Lines, now: Lines) -> None:
    assert not mapper.goes_on(lines(*before), lines(*now))


def test_over_a_boot_devices_may_have_other_numbers() -> None:
    before = lines(*LINEAR)
    assert mapper.is_alike(before, lines("0 8 linear 253:0 2048"))
    assert mapper.is_alike(before, lines("0 12 linear 253:0 2048"))
    assert not mapper.is_alike(before, lines("0 8 snapshot-merge 253:3 253:4 P 16"))
    assert not mapper.is_alike(before, lines("0 4 linear 8:16 2048"))


def test_no_key_is_remembered() -> None:
    (line,) = lines(f"0 8 crypt aes-xts-plain64 {KEY} 0 8:16 0")
    assert line.startswith("0 8 crypt ")
    assert KEY[:8] not in line
    assert KEY[-8:] not in line


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    """Of a device that the kernel does not know, or of one without device-mapper."""
    (tmp_path / "dm").mkdir()
    device = BlockDevice("/dev/mapper/none", "dm-9999", tmp_path, (1, 9999))
    with pytest.raises(BlktrackError, match="table of /dev/mapper/none cannot be read") as caught:
        mapper.table(device)
    assert "/dev/mapper/control" in caught.value.hint


def test_a_disk_of_another_kind_has_none(tmp_path: Path) -> None:
    assert mapper.table(BlockDevice("/dev/sda", "sda", tmp_path, (8, 0))) == []
