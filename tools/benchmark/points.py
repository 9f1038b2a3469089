"""Crash points of a source that is being written: how often there is one, and what it takes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from blktrack.units import GIB, KIB, SECTOR
from tools.benchmark.figure import Figure, Run
from tools.benchmark.lab import BLKTRACK, Disk, Failed, Lab, blktrack, run, same, stop

NAMES = ("points",)
SIZE = 2 * GIB
WRITTEN = GIB  # of which so much is written to
RATES = (5, 50, 200)  # MB/s
LOADS = {
    "random": ("--rw=randwrite", "--norandommap", "--iodepth=32", f"--bs={4 * KIB}"),
    "sequential": ("--rw=write", "--iodepth=8", f"--bs={256 * KIB}"),
}
WHERE = {"raw": "no file system", "ext4": "in a file on ext4"}
_PAUSE = 2  # seconds of writing before each point
_LONGEST = 3600  # seconds that a writer is left behind for, if we are killed


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    for where in WHERE:
        for load in LOADS:
            for rate in RATES:
                yield _points(lab, where, load, rate, count=3 if quick else 10)


def _points(lab: Lab, where: str, load: str, rate: int, *, count: int) -> Figure:
    size = "4 KiB random" if load == "random" else "256 KiB sequential"
    figure = Figure(
        "points",
        f"time to a crash point, {rate} MB/s of {size} writes, {WHERE[where]}",
        "s",
        note=f"`blktrack sync --json`, start of the process to exit, {_PAUSE} s after the one "
        "before; fio with direct I/O, loop devices in memory, the increment staged on the disk; "
        "where no point was reached (exit 4) no time is counted; the replica compared at the end",
    )
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(lab.device(SIZE, filled=0))
        replica = stack.enter_context(lab.device(SIZE, filled=0))
        with contextlib.ExitStack() as mounts:
            file = source.path
            if where == "ext4":
                file = str(mounts.enter_context(lab.mounted(source, "ext4")) / "file")
            # Laid out before, so that a write is a write and no allocation.
            _fio(file, "--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1")
            stack.enter_context(lab.tracked(source))
            blktrack("sync", source.path, replica.path)
            with _writer(file, *LOADS[load], f"--rate={rate * 1_000_000}"):
                figure.runs = [_point(source, replica) for _ in range(count)]
        blktrack("sync", source.path, replica.path)
        same(source, replica)
    reached = [done for done in figure.runs if done["reached"]]
    figure.values = [done["seconds"] for done in reached]
    figure.parts["reached"] = f"{len(reached)} of {count}"
    figure.parts["written_MB_per_second"] = round(median(d["written_rate"] for d in figure.runs), 1)
    for name in ("seconds", "rounds", "freeze_s", "MiB") if reached else ():
        values = [done[name] for done in reached]
        figure.parts[name] = f"{median(values):.4g}, at worst {max(values):.4g}"
    if missed := [done["seconds"] for done in figure.runs if not done["reached"]]:
        figure.parts["seconds_without_a_point"] = f"{median(missed):.4g}"
    if reached:
        frozen = sum(done["consistency"] == "filesystem" for done in reached)
        figure.parts["under_a_freeze"] = f"{frozen} of {len(reached)}"
    return figure


def _point(source: Disk, replica: Disk) -> Run:
    """Ask for a point after a pause. Exit 4 without any output: there was none."""
    written, begun = _written(source), time.monotonic()
    time.sleep(_PAUSE)
    asked = time.monotonic()
    out = run(BLKTRACK, "sync", source.path, replica.path, "--json", ok=(0, 4))
    ended = time.monotonic()
    done: Run = {"reached": bool(out), "seconds": ended - asked}
    done["written_rate"] = (_written(source) - written) / (ended - begun) / 1e6
    if out:
        report = json.loads(out)
        done |= {name: report[name] for name in ("rounds", "freeze_s", "consistency")}
        done["MiB"] = report["bytes_changed"] / (1 << 20)
    return done


def _written(disk: Disk) -> int:
    """Bytes that the kernel counted as written to a device."""
    fields = Path(f"/sys/block/{disk.name}/stat").read_text(encoding="ascii").split()
    return int(fields[6]) * SECTOR


def _command(file: str, *options: str) -> list[str]:
    common = f"--name=w --filename={file} --size={WRITTEN} --ioengine=libaio --direct=1 --thread"
    return ["fio", *common.split(), *options]


def _fio(file: str, *options: str) -> None:
    run(*_command(file, *options))


@contextlib.contextmanager
def _writer(file: str, *options: str) -> Iterator[None]:
    """fio writing until the end of the context."""
    command = _command(file, *options, "--time_based", f"--runtime={_LONGEST}")
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, text=True, start_new_session=True
        )
        try:
            yield
            if process.poll() is not None:
                said.seek(0)
                raise Failed(f"fio ended early: {said.read()}")
        finally:
            stop(process)
