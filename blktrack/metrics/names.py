"""Every metric: its name, its type and what it says. Bytes, seconds, instants since the epoch."""

from __future__ import annotations

from blktrack.metrics.text import Metric

DEVICE_STATES = ("tracking", "gap", "absent", "stopped", "untracked")
LINK_STATES = ("initial", "ready", "resync", "unfinished")

_GAUGES = {
    "build_info": "Always 1; the versions of blktrack and of the kernel.",
    "up": "1 if all figures could be had, 0 if some are missing here.",
    "policy_valid": "0 if the policy file cannot be followed; what it promises is missing here.",
    "collected_timestamp_seconds": "When these figures were taken.",
    "collect_duration_seconds": "How long it took to take these figures.",
    "device_up": "0 if what the kernel knows of the device could not be had this time.",
    "device_state": "1 for the state that tracking of the device is in.",
    "device_size_bytes": "Size of what is tracked.",
    "device_granularity_bytes": "Bytes that are marked as changed together.",
    "device_dirty_bytes": "Changed since the last sync of any replica began.",
    "device_generation_start_timestamp_seconds": "When the gap-free tracking history began.",
    "device_last_doubt_timestamp_seconds": "When a gap-free tracking history last "
    "ended, so that replicas need a resync.",
    "device_kernel_memory_bytes": "Kernel memory of the device's dirty maps.",
    "device_write_cost_seconds": "Mean kernel time that tracking adds to a write, as long as "
    "kernel.bpf_stats_enabled was on.",
    "link_state": "1 for the state that the replica is in.",
    "link_in_progress": "1 while a sync or send is running.",
    "link_lag_seconds": "Age of the newest point on the replica.",
    "link_point_timestamp_seconds": "The instant whose state the replica holds.",
    "link_rpo_seconds": "Age of the newest point that the policy promises.",
    "link_rpo_warning_seconds": "Age from which on the replica is late.",
    "link_rpo_error_seconds": "Age from which on the promise is broken.",
    "link_pending_bytes": "What the next sync has to look at.",
    "link_held_bytes": "Of these, what is durable on the other host already.",
    "link_last_run_timestamp_seconds": "When the last run ended, however it did.",
    "link_last_run_duration_seconds": "How long the last run took.",
    "link_last_run_exit_code": "Exit code of the last run: 0 done, 4 no point, 6 busy.",
    "link_last_success_timestamp_seconds": "When the last run that reached a point ended.",
    "link_last_failure_timestamp_seconds": "When the last run that failed ended.",
    "link_last_freeze_seconds": "How long the last run that reached a point froze file systems.",
    "link_failures_in_a_row": "Runs that failed since the last success.",
}
_COUNTERS = {
    "device_writes_total": "Writes and discards since the tracking history began.",
    "device_written_bytes_total": "Bytes changed since the tracking history began.",
    "device_losses_total": "Changes that may have gone unmarked; any costs a resync.",
    "device_doubts_total": "Ends of the tracking history; each costs every replica a resync.",
    "program_runs_total": "Runs of a tracking program while kernel.bpf_stats_enabled was on.",
    "program_run_seconds_total": "Time that runs of a tracking program took while "
    "kernel.bpf_stats_enabled was on.",
    "program_missed_runs_total": "Runs of a tracking program that the kernel skipped.",
    "link_runs_total": "Runs that ended, however they did.",
    "link_failures_total": "Runs that ended without a point, but for those that gave way.",
    "link_busy_total": "Runs that gave way to one that had not ended.",
    "link_resyncs_total": "Runs that compared the whole device.",
    "link_rounds_total": "Rounds of copying.",
    "link_changed_bytes_total": "Bytes in the extents that had to be looked at.",
    "link_shipped_bytes_total": "Bytes written to the replica.",
    "link_zeroed_bytes_total": "Bytes made zero on the replica without data.",
    "link_wire_bytes_total": "Bytes of streams, and to and from other hosts.",
    "link_freeze_seconds_total": "Time for which file systems were frozen.",
}
PREFIX = "blktrack_"
CATALOGUE = [
    Metric(name, kind, text)
    for kind, metrics in (("gauge", _GAUGES), ("counter", _COUNTERS))
    for name, text in metrics.items()
]
