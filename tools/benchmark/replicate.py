"""Two devices of 4 GiB, source and replica: full copies, increments, and what rsync and dd take."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from blktrack.extent import total
from blktrack.units import GIB, KIB, MIB
from tools.benchmark.figure import Figure, Run, medians
from tools.benchmark.lab import BLKTRACK, BLOCK, HERE, Disk, Failed, Lab, blktrack, run, same, timed

Way = TypeVar("Way")
NAMES = ("initial", "sync", "memory", "copy", "resync")
SIZE = 4 * GIB
BLOCKS = SIZE // 100 // BLOCK  # 1 %
_SYNC = "64 KiB blocks at random places changed, 1 % of 4 GiB; loop devices in memory"


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    with lab.device(SIZE) as source, lab.device(SIZE) as replica, lab.tracked(source):
        blktrack("sync", source.path, replica.path)
        if "initial" in wanted:
            yield _initial(source, replica, rounds=2 if quick else 5)
        if wanted & {"sync", "memory"}:
            speed, memory = _increments(lab, source, replica, rounds=2 if quick else 7)
            yield from (figure for figure in (speed, memory) if figure.name in wanted)
        if "copy" in wanted:
            yield _copy_phase(lab, source, replica, rounds=5 if quick else 15)
        if "resync" in wanted:
            yield _resync(lab, source, replica, rounds=2 if quick else 5)


def increment(lab: Lab, source: Disk, replica: Disk) -> Run:
    """Change some of the source, then time the sync as its user calls it, and check the replica."""
    lab.change(source, BLOCKS)
    done = timed(BLKTRACK, "sync", source.path, replica.path, "--quiet")
    same(source, replica)
    return done


def _initial(source: Disk, replica: Disk, *, rounds: int) -> Figure:
    figure = Figure(
        "initial",
        "copying throughput of the initial copy / dd with direct I/O and 4 MiB blocks",
        at_least=0.8,
        note="`blktrack sync --full --quiet` and `dd iflag=direct oflag=direct bs=4M`, from start "
        "to exit of the process, 4 GiB of random data between the same loop devices in memory",
    )
    full = (BLKTRACK, "sync", source.path, replica.path, "--full", "--quiet")
    ends = (f"if={source.path}", f"of={replica.path}")
    dd = ("dd", *ends, "bs=4M", "iflag=direct", "oflag=direct")
    for number in range(rounds):
        seconds = {}
        for name in order(["blktrack", "dd"], number):
            seconds[name] = timed(*(full if name == "blktrack" else dd))["seconds"]
            same(source, replica)
        figure.values.append(seconds["dd"] / seconds["blktrack"])
        figure.runs.append({f"{name}_seconds": value for name, value in seconds.items()})
    figure.parts = medians(figure.runs)
    return figure


def order(names: Sequence[Way], number: int) -> Sequence[Way]:
    """A B, then B A, then A B …"""
    return names if number % 2 == 0 else names[::-1]


def _increments(lab: Lab, source: Disk, replica: Disk, *, rounds: int) -> tuple[Figure, Figure]:
    speed = Figure(
        "sync",
        "incremental sync, 4 GiB, 1 % changed: time of rsync / time of blktrack",
        at_least=40,
        note=f"{_SYNC}. `blktrack sync --quiet` against `rsync --inplace --copy-devices "
        "--write-devices`, which copies whole files between local paths, start of the process to "
        "exit, the replica compared after each. rsync's delta transfer (--no-whole-file) is run "
        "once, for comparison",
    )
    memory = Figure(
        "memory",
        "peak memory of an incremental sync",
        "MiB",
        at_most=120,
        note="largest resident set of the whole process, of the syncs timed for `sync`",
    )
    rsync = ("rsync", "--inplace", "--copy-devices", "--write-devices", source.path, replica.path)
    for number in range(rounds):
        done: dict[str, Run] = {}
        for name in order(["blktrack", "rsync"], number):
            if name == "blktrack":
                # What rsync wrote is a change behind its back: one resync settles that.
                blktrack("sync", source.path, replica.path)
                done[name] = increment(lab, source, replica)
            else:
                done[name] = _other(lab, source, replica, *rsync)
        speed.values.append(done["rsync"]["seconds"] / done["blktrack"]["seconds"])
        speed.runs.append({f"{name}_seconds": run["seconds"] for name, run in done.items()})
        speed.runs[-1]["blktrack_cpu_seconds"] = done["blktrack"]["cpu_seconds"]
        memory.values.append(done["blktrack"]["peak_bytes"] / MIB)
        memory.runs.append(done["blktrack"])
    speed.parts = medians(speed.runs)
    delta = _other(lab, source, replica, *rsync, "--no-whole-file")
    speed.parts["rsync_delta_seconds"] = round(delta["seconds"], 3)
    blktrack("sync", source.path, replica.path)
    return speed, memory


def _other(lab: Lab, source: Disk, replica: Disk, *command: str) -> Run:
    """The same with another tool, from the same state: replica equal, then 1 % changed."""
    lab.change(source, BLOCKS)
    done = timed(*command)
    same(source, replica)
    return done


def _copy_phase(lab: Lab, source: Disk, replica: Disk, *, rounds: int) -> Figure:
    figure = Figure(
        "copy",
        "copy phase of that sync / a minimal C program with direct I/O: throughput",
        at_least=0.8,
        note="blktrack's copy of the extents of such a sync, from opening the devices to durable "
        "and accounted for, inside a fresh process; tools/copyref.c (gcc -O2) does the same pread, "
        "pwrite and fsync in one thread and times itself",
    )
    binary = str(lab.disk / "copyref")
    if shutil.which("gcc") is None:
        raise Failed("gcc is not installed")
    run("gcc", "-O2", "-o", binary, str(HERE.parent / "copyref.c"))
    extents = lab.change(source, BLOCKS)
    lines = "".join(f"{start} {length}\n" for start, length in extents.tolist())
    for number in range(rounds):
        seconds = {}
        for name in order(["blktrack", "c"], number):
            if name == "c":
                taken, count = run(binary, source.path, replica.path, text=lines).split()
            else:
                taken, count = _ours(source, replica, lines)
            seconds[name] = float(taken)
            if int(count) != total(extents):
                raise Failed(f"{name} copied {count} bytes, not {total(extents)}")
        same(source, replica)
        figure.values.append(seconds["c"] / seconds["blktrack"])
        figure.runs.append({f"{name}_seconds": value for name, value in seconds.items()})
    figure.parts = medians(figure.runs, digits=4) | {"extents": len(extents)}
    return figure


def _ours(source: Disk, replica: Disk, lines: str) -> tuple[str, str]:
    inside = (sys.executable, "-m", "tools.benchmark.inside", "copy")
    done = json.loads(run(*inside, source.path, replica.path, str(4 * KIB), text=lines))
    return str(done["seconds"]), str(int(done["bytes"]))


def _resync(lab: Lab, source: Disk, replica: Disk, *, rounds: int) -> Figure:
    figure = Figure(
        "resync",
        "resync of 4 GiB of which 1 % differs / reading source or replica once with digests: time",
        at_most=1.3,
        note="64 KiB blocks of the replica changed behind its back, `blktrack sync --quiet`, start "
        "of the process to exit, against the slower of two runs of a process that reads source or "
        "replica with direct I/O, 4 MiB at a time, into SHA-256; `shipped` is what one resync "
        "wrote, in percent of the pair",
    )
    for number in range(rounds):
        seconds = {}
        for name in order(["resync", "source", "replica"], number):
            if name == "resync":
                lab.change(replica, BLOCKS)
                seconds[name] = timed(BLKTRACK, "sync", source.path, replica.path, "--quiet")[
                    "seconds"
                ]
                same(source, replica)
            else:
                disk = source if name == "source" else replica
                inside = (sys.executable, "-m", "tools.benchmark.inside", "digest", disk.path)
                seconds[name] = timed(*inside)["seconds"]
        figure.values.append(seconds["resync"] / max(seconds["source"], seconds["replica"]))
        figure.runs.append({f"{name}_seconds": value for name, value in seconds.items()})
    lab.change(replica, BLOCKS)
    done = json.loads(run(BLKTRACK, "sync", source.path, replica.path, "--json"))
    figure.parts = medians(figure.runs)
    figure.parts["shipped_percent"] = round(100 * done["bytes_shipped"] / SIZE, 2)
    return figure
