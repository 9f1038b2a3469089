"""The programs of each kind of device, and what the kernel tells of those that are attached."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from blktrack.bpf import abi, libbpf

# What sees a change begin, then what sees it end.
BY_KIND = {
    abi.KIND_REQUEST: ("blk_rq_issue", "blk_rq_complete"),
    abi.KIND_BIO: ("blk_bio_queue", "blk_bio_complete"),
}


@dataclass(frozen=True)
class Program:
    """An attached program's numbers, from the kernel's own accounting, with those of its copies."""

    links: tuple[int, ...]  # ids
    skipped: tuple[int, ...]  # runs of each left out, as it was running on that CPU already
    runs: int  # of the first, counted while kernel.bpf_stats_enabled is on
    run_ns: int  # of all

    @classmethod
    def of(cls, copies: Iterable[tuple[int, libbpf.ProgramInfo]]) -> Self:
        links, told = zip(*copies, strict=True)
        skipped = tuple(info.recursion_misses for info in told)
        return cls(links, skipped, told[0].run_cnt, sum(info.run_time_ns for info in told))

    @property
    def missed(self) -> int:
        """Events that no copy was run for, at most."""
        return min(self.skipped)

    def missed_since(self, skipped: Sequence[int]) -> int:
        """As `missed`, since each copy had skipped so many runs.

        What was skipped between the reading of one copy's number and another's is counted both
        times if numbers to compare with were all read before any of these.
        """
        return min(now - then for now, then in zip(self.skipped, skipped, strict=True))


def copies_of(name: str) -> Iterator[str]:
    """A program and its copies, as they are pinned."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(2))


def pinned_copies(pins: Path, name: str) -> list[str]:
    """The first is in it in any case."""
    copies = copies_of(name)
    first = next(copies)
    return [first, *itertools.takewhile(lambda copy: (pins / f"link_{copy}").exists(), copies)]
