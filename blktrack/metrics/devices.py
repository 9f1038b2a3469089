"""Figures of devices, and of the programs in the kernel that all of them share."""

from __future__ import annotations

from blktrack import bitmap
from blktrack.bpf.kernel import Detached, Kernel
from blktrack.bpf.planes import Geometry
from blktrack.bpf.programs import BY_KIND
from blktrack.metrics.names import DEVICE_STATES
from blktrack.metrics.text import Exposition, Labels
from blktrack.report import DeviceStatus
from blktrack.state import DeviceState, Doubt
from blktrack.sysfs import boot_id
from blktrack.tracker.doubt import LOSSES


def add_status(out: Exposition, status: DeviceStatus, labels: Labels) -> None:
    out.add_state("device_state", DEVICE_STATES, status.state, labels)
    if status.state == "tracking":
        out.add("device_dirty_bytes", status.dirty_bytes, labels)
        out.add("device_written_bytes_total", status.written_bytes, labels)
        out.add("device_writes_total", status.writes, labels)
        out.add("device_generation_start_timestamp_seconds", status.since, labels)


def add_kernel(out: Exposition, state: DeviceState, kernel: Kernel | None, labels: Labels) -> None:
    """What needs no lock: the record of the device, and its slot as long as that is its own, which
    it is after a doubt as well, until tracking begins anew."""
    out.add("device_size_bytes", state.size, labels)
    out.add("device_granularity_bytes", state.granularity, labels)
    out.add("device_doubts_total", Doubt.count(state.doubts), labels)
    if state.doubts:
        out.add("device_last_doubt_timestamp_seconds", state.doubts[-1].time, labels)
    if kernel is None or not _has_slot(state, kernel):
        return
    geometry = Geometry(bitmap.granules_for(state.size, state.granularity))
    out.add("device_kernel_memory_bytes", 2 * geometry.map_bytes, labels)
    stats = kernel.stats(state.slot)
    for cause in LOSSES:
        out.add("device_losses_total", stats[cause], {**labels, "cause": cause})
    window = kernel.windows.window(state.slot)
    if window is not None:
        out.add("device_write_cost_seconds", _cost(kernel, window.kind), labels)


def _has_slot(state: DeviceState, kernel: Kernel) -> bool:
    if state.slot < 0 or state.boot_id != boot_id():
        return False
    return kernel.active_map(state.slot) in state.maps


def _cost(kernel: Kernel, kind: int) -> float | None:
    """Mean of the two programs that see each change, in seconds; None if the kernel counted no
    run."""
    try:
        programs = kernel.programs(kind).values()
    except Detached:
        return None
    if not all(program.runs for program in programs):
        return None
    return sum(program.run_ns / program.runs for program in programs) / 1e9


def add_programs(out: Exposition, kernel: Kernel) -> None:
    for kind in BY_KIND:
        try:
            programs = kernel.programs(kind)
        except Detached:  # no device of this kind is tracked
            continue
        for name, program in programs.items():
            labels = {"program": name}
            out.add("program_missed_runs_total", program.missed, labels)
            if program.runs:
                out.add("program_runs_total", program.runs, labels)
                out.add("program_run_seconds_total", program.run_ns / 1e9, labels)
