"""What the programs cost, by the kernel's own run-time statistics (kernel.bpf_stats_enabled)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blktrack.bpf import abi, compile, layout, libbpf, structs
from blktrack.bpf.btf import Btf
from blktrack.bpf.kernel import Kernel
from blktrack.bpf.programs import BY_KIND
from blktrack.tracker.opening import hold
from blktrack.tracker.tracker import find
from blktrack.tracker.tracking import Tracking
from blktrack.units import GIB
from tools.benchmark.figure import Figure, Run, medians
from tools.benchmark.lab import Disk, Lab
from tools.benchmark.load import fio

NAMES = ("cost",)
SWITCH = Path("/proc/sys/kernel/bpf_stats_enabled")
ISSUE, COMPLETE = BY_KIND[abi.KIND_REQUEST]
_LARGE = 240 * GIB  # the largest at a granularity of 4 KiB by default


@dataclass(frozen=True)
class Tally:
    """Runs of a program and the nanoseconds they took."""

    runs: int
    ns: int

    def since(self, before: Tally) -> Tally:
        return Tally(self.runs - before.runs, self.ns - before.ns)


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    seconds, rounds = (3, 3) if quick else (5, 7)
    figure = Figure(
        "cost",
        "cost per tracked write by the kernel's run-time statistics, both programs",
        "ns",
        at_most=300,
        note="all time of both programs, other devices' events included, by the tracked writes of "
        f"{seconds} s of fio as in `fio`; the statistics' own cost is included, `empty` tells it: "
        "programs that do nothing, on the same tracepoints in the same runs",
    )
    with _statistics(), _empty() as empty:
        with lab.device(2 * GIB) as disk, lab.tracked(disk):
            for _ in range(rounds):
                figure.runs.append(_cost(lab, disk, empty, "--time_based", f"--runtime={seconds}"))
        figure.values = [run["both_ns"] for run in figure.runs]
        figure.parts.update(medians(figure.runs, digits=1))
        for name, runs in _fresh(lab, empty, quick=quick).items():
            figure.parts[f"{name}_ns"] = medians(runs)["both_ns"]
            figure.parts[f"{name}_runs"] = runs
    yield figure


def _fresh(lab: Lab, empty: dict[str, int], *, quick: bool) -> dict[str, list[Run]]:
    """The same random writes twice after a swap, on a large device: new marks, known ones."""
    runs: dict[str, list[Run]] = {"240_gib_new_bits": [], "240_gib_repeated": []}
    with lab.device(_LARGE, filled=0) as disk:
        for number in range(2 if quick else 4):
            writes = ("--number_ios=200000", f"--randseed={number + 1}")
            fio(disk, *writes)  # gives the writes' places memory, which would be measured too
            with lab.tracked(disk):
                fio(disk, *writes)  # the programs and their maps come into the caches
                _swap(lab, disk)
                for kind in runs.values():
                    kind.append(_cost(lab, disk, empty, *writes))
            disk.empty()
    return runs


def _swap(lab: Lab, disk: Disk) -> None:
    state, device = find(lab.store, disk.path)
    with hold(lab.store, state.id, disk.path), Tracking(lab.store, state, device) as tracking:
        tracking.drain()


def _cost(lab: Lab, disk: Disk, empty: dict[str, int], *options: str) -> Run:
    """Nanoseconds per tracked write in a run of fio, and their parts per run of each program."""
    state, _ = find(lab.store, disk.path)
    with Kernel(lab.store.paths.pins) as pins:
        before, writes = _tallies(pins, empty), pins.stats(state.slot)["writes"]
        done = fio(disk, *options)
        after, writes = _tallies(pins, empty), pins.stats(state.slot)["writes"] - writes
    spent = {name: after[name].since(before[name]) for name in after}
    per_run = {name: round(tally.ns / max(tally.runs, 1), 1) for name, tally in spent.items()}
    return {
        "both_ns": round((spent["issue"].ns + spent["complete"].ns) / writes, 1),
        "issue_ns": per_run["issue"],
        "complete_ns": per_run["complete"],
        "empty_issue_ns": per_run["empty_issue"],
        "empty_complete_ns": per_run["empty_complete"],
        "writes": writes,
        "issue_runs": spent["issue"].runs,
        "complete_runs": spent["complete"].runs,
        "writes_per_second": round(done["writes_per_second"]),
    }


def _tallies(pins: Kernel, empty: dict[str, int]) -> dict[str, Tally]:
    ours = pins.programs(abi.KIND_REQUEST)
    tallies = {
        "issue": Tally(ours[ISSUE].runs, ours[ISSUE].run_ns),
        "complete": Tally(ours[COMPLETE].runs, ours[COMPLETE].run_ns),
    }
    for name, fd in empty.items():
        info = libbpf.info(fd, structs.ProgramInfo)
        tallies[name] = Tally(info.run_cnt, info.run_time_ns)
    return tallies


@contextlib.contextmanager
def _empty() -> Iterator[dict[str, int]]:
    """Programs that do nothing, attached where ours are: descriptors by name."""
    text = "".join(f"int {name}(u64 *ctx)\n{{\n\treturn 0;\n}}\n" for name in layout.PROGRAMS)
    code = compile.compile_programs(abi.c_header() + text)
    with contextlib.ExitStack() as stack:
        btf = Btf()
        stack.callback(btf.close)
        programs = {}
        for name, program in (("empty_issue", ISSUE), ("empty_complete", COMPLETE)):
            target = btf.tracepoint(layout.PROGRAMS[program])
            programs[name] = libbpf.load_program(name, code[program], target)
            stack.callback(os.close, programs[name])
            stack.callback(os.close, libbpf.attach(programs[name]))
        yield programs


@contextlib.contextmanager
def _statistics() -> Iterator[None]:
    """The kernel counts the runs of programs and their time meanwhile."""
    before = SWITCH.read_text()
    SWITCH.write_text("1")
    try:
        yield
    finally:
        SWITCH.write_text(before)
