"""What `--limit` lets through, looked at on the link."""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from blktrack.units import MIB
from tools.benchmark.figure import Figure
from tools.benchmark.lab import Lab
from tools.benchmark.remote.changes import Maker, put, whole
from tools.benchmark.remote.hosts import Sample, shaped, two_hosts

_RATE = 2 * MIB  # bytes per second
_SECONDS = 20
_SIZE = 64 * MIB


def measure(lab: Lab, name: str, *, quick: bool) -> Iterator[Figure]:
    rounds = 1 if quick else 3
    rate = Figure(
        name,
        f"`--limit 2M`: off the limit over {_SECONDS} s",
        "%",
        at_most=5,
        note=f"of all stretches of {_SECONDS} s, from the first data to the last, the one that is "
        "farthest off, in what it carried; bytes as ssh sends them, random data, 1 Gbit/s, 1 ms",
    )
    burst = Figure(
        name,
        "`--limit 2M`: busiest second",
        "s",
        at_most=2,
        note="bytes in it, in seconds of the limit: a burst of a second would make it 2",
    )
    with (
        tempfile.TemporaryDirectory(prefix="far-", dir=lab.memory) as folder,
        lab.device(_SIZE) as source,
        lab.tracked(source),
        two_hosts() as hosts,
    ):
        replica = Path(folder) / "replica"
        hosts.sync(source, replica)
        hosts.link.shape(shaped(1000, 1))
        for _ in range(rounds):
            put(source, whole(Maker().noise((_SECONDS + 4) * _RATE)))
            done, samples = hosts.sampled(*hosts.command(source, replica, "--limit", "2M"))
            carried = [count / _SECONDS / _RATE for count in _stretches(samples, _SECONDS)]
            seconds = [count / _RATE for count in _stretches(samples, 1)]
            rate.values.append(100 * max(abs(part - 1) for part in carried))
            burst.values.append(max(seconds))
            run = {"seconds": done["seconds"], "least": min(carried), "most": max(carried)}
            rate.runs.append(run)
            burst.runs.append({"least": min(seconds), "most": max(seconds)})
    yield rate
    yield burst


def _stretches(samples: list[Sample], seconds: float) -> Iterator[float]:
    """Bytes in each stretch of so many seconds that begins at a sample."""
    times = [sample.when for sample in samples]
    for first in samples:
        end = bisect_left(times, first.when + seconds)
        if end == len(samples):
            return
        # To the very moment: the looks are not as regular as a clock.
        before, after = samples[end - 1], samples[end]
        part = (first.when + seconds - before.when) / (after.when - before.when)
        yield before.up + part * (after.up - before.up) - first.up
