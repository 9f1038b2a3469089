"""What looking costs: `top` on a terminal, ten devices under load, a refresh a second."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Thread

from blktrack.units import GIB, MIB
from tools.benchmark.figure import Figure, Run, medians
from tools.benchmark.lab import BLKTRACK, Failed, Lab, blktrack, run, stop

NAMES = ("top", "top-large")
TIB = 1 << 40
_DEVICES = 10
_WRITES = 200  # a second, to each device
_WARM = 5.0  # seconds until programs are loaded and the first screen is drawn


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    seconds, rounds = (20, 1) if quick else (60, 3)
    if "top" in wanted:
        yield _top(lab, "top", GIB, seconds, rounds)
    if "top-large" in wanted:
        yield _top(lab, "top-large", 16 * TIB, seconds, rounds)


def _top(lab: Lab, name: str, size: int, seconds: int, rounds: int) -> Figure:
    figure = Figure(
        name,
        f"CPU time of `blktrack top`, ten devices of {size // GIB:,} GiB, 1 refresh a second",
        "%",
        at_most=2.0,
        note=f"of one CPU, user and system, over {seconds} s from its {_WARM:.0f}th second on; "
        f"{_WRITES} random 4 KiB writes a second to each device, on a terminal of 200 columns and "
        "60 rows, of which every byte is read",
    )
    with ExitStack() as stack:
        disks = [stack.enter_context(lab.device(size, filled=0)) for _ in range(_DEVICES)]
        for disk in disks:
            blktrack("track", disk.path)
            stack.callback(run, BLKTRACK, "untrack", disk.path, ok=(0, 1, 2, 3))
        jobs = [f"--name=w{number}" for number, _ in enumerate(disks)]
        words = "--ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=2 --thread"
        limits = (f"--size={64 * MIB}", "--time_based", "--runtime=86400", f"--rate_iops={_WRITES}")
        load = ["fio", *words.split(), *limits]
        for job, disk in zip(jobs, disks, strict=True):
            load += [job, f"--filename={disk.path}"]
        writer = subprocess.Popen(
            load,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        stack.callback(stop, writer)
        for _ in range(rounds):
            figure.runs.append(_run(seconds))
    figure.values = [run["percent"] for run in figure.runs]
    figure.parts = medians(figure.runs, digits=2)
    return figure


def _run(seconds: int) -> Run:
    """CPU time of the process while it does nothing but refresh, and bytes to the terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (60, 200))
    process = subprocess.Popen(
        [BLKTRACK, "top"],
        stdin=theirs,
        stdout=theirs,
        text=True,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
    )
    os.close(theirs)
    received = [0]
    reader = Thread(target=_read, args=(ours, received))
    reader.start()
    try:
        time.sleep(_WARM)
        before = (_cpu(process.pid), received[0], time.monotonic())
        time.sleep(seconds)
        after = (_cpu(process.pid), received[0], time.monotonic())
        if process.poll() is not None or after[1] == before[1]:
            raise Failed(f"top ended, or showed nothing new for {seconds} s")
    finally:
        stop(process, signal.SIGTERM)
        reader.join()
        os.close(ours)
    passed = after[2] - before[2]
    return {
        "percent": 100 * (after[0] - before[0]) / passed,
        "bytes_per_refresh": (after[1] - before[1]) / passed,
    }


def _cpu(pid: int) -> float:
    """Seconds, user and system (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read(fd: int, received: list[int]) -> None:
    """All that comes, until the other side is closed."""
    while True:
        try:
            received[0] += len(os.read(fd, 1 << 16))
        except OSError:
            return
