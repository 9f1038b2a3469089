"""Large devices, sparse: what a sync costs must follow what changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from blktrack.point import Point
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.state import LinkState
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold
from blktrack.tracker.tracker import find
from blktrack.tracker.tracking import Tracking
from blktrack.units import GIB, KIB, MIB
from tools.benchmark.figure import Figure, medians
from tools.benchmark.lab import BLKTRACK, Disk, Lab, blktrack, run
from tools.benchmark.load import fio
from tools.benchmark.replicate import BLOCKS, increment, order

NAMES = ("large", "drain")
TIB = 1 << 40
_GRANULES = 100_000


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    if "large" in wanted:
        yield _large(lab, rounds=3 if quick else 9)
    if "drain" in wanted:
        yield _drain(lab, rounds=3 if quick else 9)


def linked(lab: Lab, source: Disk, replica: Disk) -> None:
    """Put the replica of an untouched source on record as copied: both read as zeroes throughout.

    What a first sync does, without reading the device. Nothing may have been written to either.
    """
    store = lab.store
    state, device = find(store, source.path)
    with Replica.open(replica.path, source=device, link=None, paths=store.paths) as target:
        link = LinkState(target.link, replica.name, replica.path)
        with (
            hold(store, state.id, source.path),
            Tracking(store, state, device) as tracking,
        ):
            swap = tracking.drain()
            LinkSets(tracking, link, create=True).close()
        point = Point(swap.epoch, swap.generation, swap.time, "none")
        target.begin(State.UNFINISHED, swap.generation)
        target.commit(point)
        link.cursor = point
        store.save_link(state.id, link)


def _large(lab: Lab, *, rounds: int) -> Figure:
    figure = Figure(
        "large",
        "sync of the same dirty set, sparse 4 TiB device / 4 GiB device: time",
        at_most=1.5,
        note=f"{BLOCKS} blocks of 64 KiB at random places, `blktrack sync --quiet`, start of the "
        "process to exit, loop devices in memory, all four sparse, replicas compared after each; "
        "both have the default granularity, at 4 TiB 128 KiB, so there each block ships twice the "
        "bytes. The initial copy of 4 TiB of zeroes is put on record instead of made, for both",
    )
    with ExitStack() as stack:
        pairs = {}
        for name, size in (("small", 4 * GIB), ("large", 4 * TIB)):
            source = stack.enter_context(lab.device(size, filled=0))
            replica = stack.enter_context(lab.device(size, filled=0))
            stack.enter_context(lab.tracked(source))
            linked(lab, source, replica)
            pairs[name] = (source, replica)
            increment(lab, source, replica)
        for number in range(rounds):
            lab.need(GIB)
            names = order(list(pairs), number)
            seconds = {name: increment(lab, *pairs[name])["seconds"] for name in names}
            figure.values.append(seconds["large"] / seconds["small"])
            figure.runs.append({f"{name}_seconds": seconds[name] for name in pairs})
    figure.parts = medians(figure.runs)
    return figure


def _drain(lab: Lab, *, rounds: int) -> Figure:
    figure = Figure(
        "drain",
        "swap, drain and extents of a 16 TiB device at 64 KiB granularity",
        "ms",
        at_most=60,
        note=f"from the swap until the extents to ship are known (Tracking.drain, LinkSets.take), "
        f"inside a fresh process, after {_GRANULES:,} writes of 4 KiB at random places of a sparse "
        "loop device",
    )
    with lab.device(16 * TIB, filled=0) as source, lab.device(16 * TIB, filled=0) as replica:
        blktrack("track", source.path, "--granularity", str(64 * KIB))
        try:
            linked(lab, source, replica)
            for number in range(rounds):
                fio(source, f"--number_ios={_GRANULES}", f"--randseed={number + 1}")
                inside = (sys.executable, "-m", "tools.benchmark.inside", "drain")
                figure.runs.append(json.loads(run(*inside, source.path)))
                source.empty()
        finally:
            run(BLKTRACK, "untrack", source.path, ok=(0, 1, 2, 3))
    figure.values = [run["total_ms"] for run in figure.runs]
    figure.parts = medians(figure.runs, digits=2)
    figure.parts["MiB"] = figure.parts.pop("bytes") / MIB
    return figure
