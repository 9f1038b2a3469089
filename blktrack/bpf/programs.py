"""The programs of each kind of device, and what the kernel tells of those that are attached."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from blktrack.bpf import abi, libbpf, structs

# What sees a change begin, then what sees it end.
BY_KIND = {
    abi.KIND_REQUEST: ("blk_rq_issue", "blk_rq_complete"),
    abi.KIND_BIO: ("blk_bio_queue", "blk_bio_complete"),
}


@dataclass(frozen=True)
class Program:
    """An attached program's numbers, from the kernel's own accounting, with those of its copies."""

    links: tuple[int, ...]  # ids
    skipped: tuple[int, ...]  # events that each was not run for, as it was running on that CPU
    missed: int  # events that none of them was run for
    probe: bool  # whether the first is one, see layout.py
    runs: int  # of the first, counted while kernel.bpf_stats_enabled is on
    run_ns: int  # of all

    @classmethod
    def look(
        cls, links: Sequence[int], programs: Sequence[int], caught: Callable[[], int] | None
    ) -> Self:
        """At open programs, the first and its copies, with the ids of their links.

        caught -- how many of the events that the first was not run for were seen by copies
        (track.c). It is read before what the kernel says of the first: what comes in between then
        counts as missed, until the next look. None, where it is not counted: then as many are
        missed as are by the best of them, at most.
        """
        before = caught() if caught else 0
        told: list[structs.ProgramInfo] = [libbpf.info(fd, structs.ProgramInfo) for fd in programs]
        skipped = tuple(info.recursion_misses for info in told)
        return cls(
            tuple(links),
            skipped,
            skipped[0] - before if caught else min(skipped),
            told[0].type == libbpf.PROG_TYPE_KPROBE,
            told[0].run_cnt,
            sum(info.run_time_ns for info in told),
        )

    def missed_since(self, missed: int) -> int:
        """Events since that number was read; below 0, runs that the kernel left out uncounted.

        Of the programs on tracepoints it counts all. Probes may be switched off altogether, as by
        the sysctl kernel.ftrace_enabled, and copies then catch what was never counted.
        """
        since = self.missed - missed
        return since if self.probe else max(since, 0)


def copies_of(name: str) -> Iterator[str]:
    """A program and its copies, as they are pinned."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(2))


def pinned_copies(pins: Path, name: str) -> list[str]:
    """The first is in it in any case."""
    copies = copies_of(name)
    first = next(copies)
    return [first, *itertools.takewhile(lambda copy: os.path.exists(f"{pins}/link_{copy}"), copies)]
