"""A large increment over a link with a round trip of 100 ms."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blktrack.units import MIB, format_size
from tests.lane import Shape
from tools.benchmark.figure import Figure, Run, medians
from tools.benchmark.lab import Disk, Lab, same
from tools.benchmark.remote.changes import Maker, put, whole
from tools.benchmark.remote.hosts import MBIT, Hosts, shaped, two_hosts

_ROUND_TRIP = 100  # ms
_WINDOW = 2 * MIB  # OpenSSH's for a channel: channels.h, CHAN_SES_WINDOW_DEFAULT
_GOAL = 0.8
_STALLS = 0.5  # per second: a tenth of the time


@dataclass(frozen=True)
class _Case:
    what: str
    shape: Shape
    most: float  # bytes per second that the link has for one connection
    goal: float | None = _GOAL


_CASES = (
    _Case("50 Mbit/s", shaped(50, _ROUND_TRIP), 50 * MBIT),
    _Case("100 Mbit/s", shaped(100, _ROUND_TRIP), 100 * MBIT),
    *(
        _Case(f"{rate} Mbit/s with stalls", shape, shape.usable)
        for rate in (50, 100)
        for shape in [shaped(rate, _ROUND_TRIP, stalls=_STALLS)]
    ),
    _Case("no limit", shaped(0, _ROUND_TRIP), _WINDOW / _ROUND_TRIP * 1000, None),
)


def measure(lab: Lab, name: str, *, quick: bool) -> Iterator[Figure]:
    changed, rounds = (128 * MIB, 1) if quick else (256 * MIB, 3)
    size = 2 * changed
    lab.need(3 * size)
    with (
        tempfile.TemporaryDirectory(prefix="far-", dir=lab.memory) as folder,
        lab.device(size) as source,
        lab.tracked(source),
        two_hosts() as hosts,
    ):
        replica = Path(folder) / "replica"
        hosts.sync(source, replica)
        for case in _CASES:
            hosts.link.shape(case.shape)
            runs = [_run(hosts, source, replica, changed) for _ in range(rounds)]
            yield _figure(name, case, changed, runs)


def _run(hosts: Hosts, source: Disk, replica: Path, changed: int) -> Run:
    put(source, whole(Maker().noise(changed)))
    done, samples = hosts.sampled(*hosts.command(source, replica))
    same(source, Disk(str(replica), replica, source.size))
    first, last = samples[0], samples[-1]
    return {
        "seconds": done["seconds"],
        "sending_seconds": last.when - first.when,
        "bytes_per_second": changed / done["seconds"],
        "bytes_per_second_of_sending": (last.up - first.up) / (last.when - first.when),
    }


def _figure(name: str, case: _Case, changed: int, runs: list[Run]) -> Figure:
    of = "what ssh's window leaves" if case.goal is None else "what the link can carry"
    return Figure(
        name,
        f"{case.what}, {_ROUND_TRIP} ms: increment of {format_size(changed)} / {of}: throughput",
        at_least=case.goal,
        values=[run["bytes_per_second"] / case.most for run in runs],
        note="random bytes, from the start of `blktrack sync --quiet` to its exit, ssh's login and "
        "the replica at its new point included; a queue of 0.1 s before the link"
        + (
            f"; {_STALLS} stalls of 0.2 s a second, not counted as rate"
            if case.shape.stalls
            else ""
        )
        + (", OpenSSH's window being 2 MiB a round trip" if case.goal is None else ""),
        parts=medians(runs),
        runs=runs,
    )
