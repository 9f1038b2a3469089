"""Parts of a sync, timed from inside a process of their own: what they print is JSON.

    inside.py copy SOURCE REPLICA GRANULARITY < extents    the copy phase; lines of "start length"
    inside.py drain DEVICE                                 swap, drain and extents of its one link
    inside.py place SOURCE REPLICA < extents               an increment, written into its replica
    inside.py stage SOURCE REPLICA < extents               the same, staged first and then applied

A sync is a fresh process, so each run is one too: nothing is warm that would not be.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from blktrack import bitmap, extent, linux
from blktrack.bitfile import BitFile
from blktrack.bpf import planes
from blktrack.bpf.kernel import Kernel
from blktrack.config import Paths
from blktrack.extent import ExtentArray
from blktrack.point import Point
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.record import State
from blktrack.ship.replica import Replica
from blktrack.state import Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.link import LinkSets
from blktrack.tracker.opening import hold
from blktrack.tracker.tracker import find
from blktrack.tracker.tracking import Tracking
from blktrack.units import MIB

Result = dict[str, float]


def copy_phase(source: str, replica: str, granularity: int) -> Result:
    """Open both ends, copy the extents, make them durable and account for them, as a sync does."""
    extents = _extents()
    size = int(extents[-1].sum())
    shipping = np.zeros(bitmap.words_for(bitmap.granules_for(size, granularity)), dtype=np.uint64)
    begun = time.perf_counter()
    with open_end(source) as reading, open_end(replica, writable=True) as writing:
        copied = copy(
            reading,
            writing,
            extents,
            granularity=granularity,
            checkpoint=lambda done: bitmap.clear_extents(shipping, granularity, size, done),
        )
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "bytes": copied.bytes_written + copied.bytes_zeroed}


def drain(path: str) -> Result:
    """Milliseconds from the swap to the extents to ship, and of its parts."""
    parts: Result = {}
    for owner, name, part in (
        (Kernel, "swap", "swap_ms"),
        (planes.Planes, "nonzero", "scan_ms"),
        (planes.Planes, "merge_into", "merge_ms"),
        (planes.Planes, "clear", "clear_ms"),
        (BitFile, "nonzero", "scan_of_sets_ms"),
        (bitmap, "extents", "extents_ms"),
        (Store, "save_epoch", "save_ms"),
    ):
        _time(owner, name, parts, part)
    store = Store(Paths.from_environment())
    state, device = find(store, path)
    (link,) = store.links(state.id)
    with hold(store, state.id, path):
        begun = time.perf_counter()
        with Tracking(store, state, device) as tracking:
            opened, cpu = time.perf_counter(), time.process_time()
            tracking.drain()
            drained = time.perf_counter()
            with LinkSets(tracking, link) as sets:
                extents = sets.take()
                taken, cpu = time.perf_counter(), time.process_time() - cpu
                sets.all_shipped()
    return {
        "total_ms": 1000 * (taken - opened),
        "cpu_ms": 1000 * cpu,
        "drain_ms": 1000 * (drained - opened),
        "take_ms": 1000 * (taken - drained),
        "open_ms": 1000 * (opened - begun),
        **parts,
        "extents": len(extents),
        "bytes": extent.total(extents),
    }


def bring(source: str, name: str, *, staged: bool) -> Result:
    """An increment from the open replica to its new point on record. The first one makes it."""
    extents, paths = _extents(), Paths.from_environment()
    device = BlockDevice.find(source)
    with (
        Replica.open(name, source=device, link="bench", paths=paths) as replica,
        open_end(source) as reading,
    ):
        old = replica.record.point if replica.record else None
        point = Point(old.epoch + 1 if old else 1, "bench", time.time(), "none")
        begun = sealed = time.perf_counter()
        if staged:
            with replica.stage() as stage:
                copy(reading, stage.end, extents, known_zero=True)
                stage.seal(extents, point)
                sealed = time.perf_counter()
                replica.apply(stage)
        else:
            replica.begin(State.APPLYING if old else State.UNFINISHED, point.generation)
            copy(reading, replica.end, extents)
            replica.commit(point)
        ended = time.perf_counter()
    parts = {"stage_seconds": sealed - begun, "apply_seconds": ended - sealed} if staged else {}
    return {"seconds": ended - begun, **parts}


def _extents() -> ExtentArray:
    return np.loadtxt(sys.stdin, dtype=np.int64, ndmin=2)


def digest(path: str) -> Result:
    """Read all of a device once, into a digest."""
    sum_, buffer = hashlib.sha256(), linux.Buffer(4 * MIB)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        for at in range(0, linux.device_size(fd), buffer.size):
            got = os.preadv(fd, [buffer.view], at)
            sum_.update(buffer.view[:got])
    finally:
        os.close(fd)
    return {"first": sum_.digest()[0]}


def _time(owner: Any, name: str, parts: Result, part: str) -> None:
    """Add the milliseconds that calls of a function take to `part`."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] = parts.get(part, 0.0) + 1000 * (time.perf_counter() - begun)

    setattr(owner, name, wrapper)


def main(words: list[str]) -> None:
    if words[0] == "copy":
        result = copy_phase(words[1], words[2], int(words[3]))
    elif words[0] in ("place", "stage"):
        result = bring(words[1], words[2], staged=words[0] == "stage")
    elif words[0] == "digest":
        result = digest(words[1])
    else:
        result = drain(words[1])
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
