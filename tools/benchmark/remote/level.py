"""The adaptive level of compression next to each fixed one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blktrack.units import MIB, format_size
from tests.lane import Shape
from tools.benchmark.figure import Figure, Run, medians
from tools.benchmark.lab import Disk, Lab
from tools.benchmark.remote.changes import Changes, Maker, put, whole
from tools.benchmark.remote.hosts import Hosts, shaped, two_hosts
from tools.benchmark.replicate import order

_ADAPT = "adapt"
_FEW = ("none", "1", "3", "6", "9", "12")
_ALL = ("none", *(str(level) for level in range(1, 13)), "15", "19")


@dataclass(frozen=True)
class _Case:
    what: str
    shape: Shape
    size: int  # bytes
    goal: float


_CASES = (
    _Case("10 Mbit/s", shaped(10, 10), 48 * MIB, 0.9),
    _Case("100 Mbit/s", shaped(100, 10), 256 * MIB, 0.9),
    _Case("no limit", shaped(0, 1), 512 * MIB, 0.8),
)


def measure(lab: Lab, name: str, *, quick: bool) -> Iterator[Figure]:
    levels, rounds, part = (_FEW, 1, 4) if quick else (_ALL, 2, 1)
    size = max(case.size for case in _CASES)
    lab.need(3 * size)
    with (
        tempfile.TemporaryDirectory(prefix="far-", dir=lab.memory) as folder,
        lab.device(size) as source,
        lab.tracked(source),
        two_hosts() as hosts,
    ):
        replica = Path(folder) / "replica"
        hosts.sync(source, replica)
        text = Maker().text(64 * MIB)
        for case in _CASES:
            hosts.link.shape(case.shape)
            count = case.size // part
            changes = whole((text * (-(-count // len(text))))[:count])
            ways = [*levels, _ADAPT]
            runs = [
                _round(hosts, source, replica, changes, order(ways, number))
                for number in range(rounds)
            ]
            yield _figure(name, case, count, runs)


def _round(hosts: Hosts, source: Disk, replica: Path, changes: Changes, ways: Sequence[str]) -> Run:
    found: Run = {}
    for way in ways:
        put(source, changes)  # to be sent again, though it is the same
        done = hosts.sync(source, replica, "--compress", way)
        found |= {f"{way}, seconds": done["seconds"], f"{way}, bytes": done["bytes"]}
    return found


def _figure(name: str, case: _Case, count: int, runs: list[Run]) -> Figure:
    parts = medians(runs)
    fixed = {key: value for key, value in parts.items() if key.endswith("seconds")}
    del fixed[f"{_ADAPT}, seconds"]
    best = min(fixed, key=fixed.__getitem__)
    return Figure(
        name,
        f"{case.what}: time at the best fixed level / at the adaptive one",
        at_least=case.goal,
        values=[run[best] / run[f"{_ADAPT}, seconds"] for run in runs],
        note=f"increment of {format_size(count)} of text, `blktrack sync --quiet --compress "
        f"LEVEL`, from the start of the process to its exit; best was {best.split(',')[0]}",
        parts=parts,
        runs=runs,
    )
