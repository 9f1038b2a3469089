"""What tracking costs the writer: fio's throughput untracked, tracked, and under blktrace."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from blktrack.units import GIB
from tools.benchmark.figure import Figure, Run
from tools.benchmark.lab import Disk, Failed, Lab, run, stop

NAMES = ("fio", "blktrace")

# The tracer inside the kernel whose output blktrace copies to files, read in its raw form.
_BLK_TRACER = """
set -e
mount -t tracefs none "$1"
cd "$1"
[ "$(cat current_tracer)" = nop ]
device=/sys/block/$2/trace
undo() {
    [ "$(cat current_tracer)" = blk ] || echo interfered >&2
    echo 0 > "$device/enable"
    echo nop > current_tracer
}
trap undo EXIT
trap 'exit 0' TERM
echo write > "$device/act_mask"
echo 1 > "$device/enable"
echo blk > current_tracer
for cpu in per_cpu/cpu*; do cat "$cpu/trace_pipe_raw" > /dev/null & done
wait
"""
_BLKTRACE = """
mount -t debugfs none "$1" && exec blktrace -r "$1" -d "/dev/$2" -a write -o - >/dev/null
"""


def fio(disk: Disk, *options: str) -> Run:
    """4 KiB random writes, 32 in flight: writes, seconds and writes per second."""
    common = f"--name=w --filename={disk.path} --ioengine=libaio --direct=1 --rw=randwrite --bs=4k"
    more = "--iodepth=32 --norandommap --thread --output-format=json"
    out = run("fio", *common.split(), *more.split(), *options)
    write = json.loads(out[out.index("{") :])["jobs"][0]["write"]
    return {
        "writes": write["total_ios"],
        "seconds": write["runtime"] / 1000,
        "writes_per_second": write["iops"],
    }


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    """Rounds of untracked, tracked and blktraced writes on one device, in changing order."""
    seconds, rounds = (3, 4) if quick else (5, 12)
    tracked = Figure(
        "fio",
        "fio 4 KiB random writes, queue depth 32: tracked / untracked throughput",
        at_least=0.95,
        note=f"pairs of {seconds} s on a 2 GiB loop device in memory; 'untracked' has no program "
        "attached, 'tracked' begins with an empty map, in changing order",
    )
    traced = Figure("blktrace", "the same under blktrace / untracked, for comparison")
    with lab.device(2 * GIB) as disk:
        time_based = ("--time_based", f"--runtime={seconds}")
        fio(disk, *time_based)  # warms up, and is not counted
        tracer, traced.note = None, "not asked for"
        if "blktrace" in wanted:
            tracer, traced.note = _tracer(disk)
        for number in range(rounds):
            kinds: list[tuple[str, AbstractContextManager[object]]] = [
                ("untracked", contextlib.nullcontext()),
                ("tracked", lab.tracked(disk)),
            ]
            if tracer is not None and number < rounds / 2:
                kinds.append(("blktrace", _traced(tracer, disk)))
            done = {}
            for kind, state in kinds if number % 2 == 0 else reversed(kinds):
                try:
                    with state:
                        done[kind] = fio(disk, *time_based)["writes_per_second"]
                except Failed:
                    if kind != "blktrace":
                        raise
                    done.pop(kind, None)
            _add(tracked, "tracked", done)
            _add(traced, "blktrace", done)
    if "fio" in wanted:
        yield tracked
    if "blktrace" in wanted:
        yield traced


def _add(figure: Figure, kind: str, done: dict[str, float]) -> None:
    if kind in done:
        figure.values.append(done[kind] / done["untracked"])
        figure.runs.append({name: done[name] for name in ("untracked", kind)})


def _tracer(disk: Disk) -> tuple[str | None, str]:
    """A script that traces the writes of a disk until it is told to end, and what it is."""
    what = {
        _BLKTRACE: "`blktrace -a write`, its output thrown away",
        _BLK_TRACER: "blktrace itself is refused here (kernel lockdown), so its tracer in the "
        "kernel, `blk`, writes only, read raw from tracefs and thrown away",
    }
    for script, note in what.items():
        with contextlib.suppress(Failed), _traced(script, disk):
            return script, note
    return None, "neither blktrace nor the kernel's blk tracer can be used here"


@contextlib.contextmanager
def _traced(script: str, disk: Disk) -> Iterator[None]:
    """Tracing, with the kernel's file system for it mounted in a namespace of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="blktrack-bench-") as folder,
        tempfile.TemporaryFile("w+") as complaints,
    ):
        command = ["unshare", "--mount", "sh", "-c", script, "sh", folder, disk.name]
        process = subprocess.Popen(command, stderr=complaints, text=True, start_new_session=True)
        try:
            deadline = time.monotonic() + 2
            while not _is_traced(disk) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.5)
            # Refused its files, blktrace says so and stays, with nobody there to read.
            complaints.seek(0)
            if process.poll() is not None or complaints.read():
                raise Failed("tracing did not begin")
            yield
        finally:
            stop(process)
        complaints.seek(0)
        if "interfered" in complaints.read():
            raise Failed("something else uses the kernel's tracers")


def _is_traced(disk: Disk) -> bool:
    return Path(f"/sys/block/{disk.name}/trace/enable").read_text().strip() == "1"
