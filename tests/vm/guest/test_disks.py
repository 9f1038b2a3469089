"""What the oracle tests see on the host's loop devices holds on each kind of disk and kernel."""

from __future__ import annotations

import pytest

from blktrack.units import MIB
from tests.blockdev import Lab
from tests.oracle import cover, replicate
from tests.vm import disks

pytestmark = pytest.mark.needs("root", "bpf", "ext4", "fio")

SIZE = 64 * MIB
COUNT = 20  # changes of each kind: the processor is an emulated one


def device(lab: Lab, kind: str) -> str:
    """A disk of the machine "plain" by its serial number, or a device that the kernel makes up."""
    match kind:
        case "loop":
            return lab.loop(SIZE)
        case "zram":
            return lab.zram(SIZE)
    return disks.find(kind)


every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("blk", marks=pytest.mark.brief),
        "scsi",
        "nvme",
        "nvme4k",
        pytest.param("loop", marks=pytest.mark.needs("loop")),
        pytest.param("zram", marks=pytest.mark.needs("zram")),
    ],
)


@every_kind
def test_tracked_extents_cover_every_difference(shared: Lab, seed: int, kind: str) -> None:
    cover(shared, seed, [device(shared, kind)], "ext4", count=COUNT)


@every_kind
def test_replica_is_identical_after_syncs_under_load(shared: Lab, seed: int, kind: str) -> None:
    target = str(shared.name("replica"))
    replicate(shared, seed, [device(shared, kind)], "ext4", target, count=COUNT)
