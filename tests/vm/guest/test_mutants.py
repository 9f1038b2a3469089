"""The matrix notices what is broken on purpose, each on a stack where it shows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from blktrack import round
from blktrack.ship.end import Endpoint
from blktrack.ship.endpoint import DeviceEnd, open_end
from tests.blockdev import Lab
from tests.test_oracle import broken_programs
from tests.vm.guest.stacks import STACKS
from tests.vm.guest.test_stacks import SIZE, mix

pytestmark = [
    pytest.mark.needs("root", "bpf", "ext4", "fio"),
    pytest.mark.machine("stacks"),
    pytest.mark.timeout(900),
]


@dataclass(frozen=True)
class Mutant:
    stack: str
    old: str = ""  # in the programs
    new: str = ""
    reads: Callable[[str], Endpoint] = open_end


def cached(path: str) -> Endpoint:
    """The source by way of the page cache, which does not know what a file system writes."""
    end = DeviceEnd(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(fd, end.fileno(), inheritable=False)
    os.close(fd)
    return end


MUTANTS = {
    "the range is that of the bio at its completion": Mutant(
        "lvm-thin",
        "	/* Another device or operation:",
        "	found->sector = FIELD(u64, bio, BIO_SECTOR);\n"
        "	found->bytes = FIELD(u32, bio, BIO_SIZE);\n"
        "	/* Another device or operation:",
    ),
    "what is in flight is not remembered": Mutant(
        "dm-delay",
        "	error = bpf_map_update_elem(MAP(MAP_INFLIGHT), &key, &entry, BPF_NOEXIST);",
        "	return;",
    ),
    "discards are no changes": Mutant(
        "null_blk",
        "#define HARMLESS(op) ((op)",
        "#define HARMLESS(op) ((op) == REQ_OP_DISCARD || (op)",
    ),
    "the source is read through the page cache": Mutant("virtio-blk", reads=cached),
}


@pytest.mark.needs("dmsetup", "lvm")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(
    shared: Lab,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    mutant = MUTANTS[name]
    paths = STACKS[mutant.stack].build(shared, SIZE)
    if mutant.old:
        broken_programs(shared, monkeypatch, mutant.old, mutant.new)
    monkeypatch.setattr(round, "open_end", mutant.reads)
    for turn in range(3):  # by chance it may not show at once
        with shared.fresh() as inner:
            try:
                mix(inner, seed + turn, paths, str(inner.name("replica")), patient=True)
            except AssertionError as error:
                said = str(error).splitlines()[0]
                record_property("measured", f"{name}: {said}")
                return
    pytest.fail(f"{name}: nothing was noticed")
