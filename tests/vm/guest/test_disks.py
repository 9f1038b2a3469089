"""The oracle tests of loop devices hold inside, in the length that they have on the host.

On one kernel: test_stacks.py has a short form of both on each.
"""

from __future__ import annotations

import pytest

from tests.blockdev import Lab
from tests.oracle import cover, replicate
from tests.vm import disks

pytestmark = [
    pytest.mark.needs("root", "bpf", "ext4", "fio"),
    pytest.mark.brief,
    pytest.mark.one_kernel,
]

COUNT = 20  # changes of each kind: the processor is an emulated one


def test_tracked_extents_cover_every_difference(shared: Lab, seed: int) -> None:
    cover(shared, seed, [disks.find("blk")], "ext4", count=COUNT)


def test_replica_is_identical_after_syncs_under_load(shared: Lab, seed: int) -> None:
    target = str(shared.name("replica"))
    replicate(shared, seed, [disks.find("blk")], "ext4", target, count=COUNT)
