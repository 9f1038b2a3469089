"""Figures of links: where the replica is, what its runs did, and what was promised of it."""

from __future__ import annotations

from blktrack import history
from blktrack.durable import is_held
from blktrack.errors import BlktrackError
from blktrack.metrics.names import DEVICE_STATES, LINK_STATES
from blktrack.metrics.text import Exposition, Labels
from blktrack.policy import LinkPolicy, Policy
from blktrack.policy.model import same_device
from blktrack.report import LinkStatus, Run
from blktrack.state import DeviceState, Store


class Places:
    """The links of the policy, and which of them there are: the others are only promised."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._devices: list[Labels] = []
        self._promised = {(link.device, link.target): link for link in policy.links if link.enabled}

    def add(self, labels: Labels) -> None:
        """A device that is tracked."""
        self._devices.append(labels)

    def take(self, device: str, target: str) -> LinkPolicy | None:
        """What is promised of a link that there is."""
        link = self._policy.link(device, target) if target else None
        return self._promised.pop((link.device, link.target), None) if link else None

    def left(self) -> list[tuple[LinkPolicy, Labels | None]]:
        """Promised links that were never synced, each with its device if that is tracked."""
        return [(link, self._device(link.device)) for link in self._promised.values()]

    def _device(self, path: str) -> Labels | None:
        return next((found for found in self._devices if same_device(found["device"], path)), None)


def add_links(
    out: Exposition,
    store: Store,
    state: DeviceState,
    links: list[LinkStatus],
    *,
    places: Places,
    device: Labels,
) -> list[str]:
    """Warnings, of what could not be had."""
    known = {link.name: link for link in store.links(state.id)}
    keys = {history.key(x.name, x.target) for x in links}
    warnings, runs, failures = [], {}, {}
    try:
        runs = history.latest(store, state.id, keys)
        failures = history.latest(store, state.id, keys, failed=True)
    except BlktrackError as error:
        warnings.append(str(error))
    for link in links:
        labels = {**device, "link": link.name, "target": link.target}
        _add_status(out, link, labels)
        _add_promise(out, places.take(device["device"], link.target), labels)
        if link.name in known:
            lock = store.link_lock(state.id, known[link.name].id)
            out.add("link_in_progress", is_held(lock), labels)
        if run := runs.get(its := history.key(link.name, link.target)):
            _add_run(out, run, labels)
        if bad := failures.get(its):
            ended = bad.begun + bad.duration_s
            out.add("link_last_failure_timestamp_seconds", ended, labels)
    return warnings


def add_planned(out: Exposition, places: Places) -> None:
    """Of links that are promised and were never synced: that is what there is to know."""
    for link, device in places.left():
        if device is None:
            device = {"device": link.device}
            out.add_state("device_state", DEVICE_STATES, "untracked", device)
        labels = {**device, "link": link.name, "target": link.target}
        out.add_state("link_state", LINK_STATES, "initial", labels)
        _add_promise(out, link, labels)


def _add_status(out: Exposition, link: LinkStatus, labels: Labels) -> None:
    out.add_state("link_state", LINK_STATES, link.state, labels)
    out.add("link_lag_seconds", link.lag_s, labels)
    out.add("link_point_timestamp_seconds", link.point, labels)
    out.add("link_pending_bytes", link.pending_bytes, labels)
    out.add("link_held_bytes", link.held_bytes, labels)


def _add_promise(out: Exposition, link: LinkPolicy | None, labels: Labels) -> None:
    if link is not None:
        out.add("link_rpo_seconds", link.rpo, labels)
        out.add("link_rpo_warning_seconds", link.rpo_warning, labels)
        out.add("link_rpo_error_seconds", link.rpo_error, labels)


def _add_run(out: Exposition, run: Run, labels: Labels) -> None:
    total = run.totals
    out.add("link_last_run_timestamp_seconds", run.begun + run.duration_s, labels)
    out.add("link_last_run_duration_seconds", run.duration_s, labels)
    out.add("link_last_run_exit_code", run.exit, labels)
    out.add("link_last_success_timestamp_seconds", total.succeeded, labels)
    if total.succeeded is not None:
        out.add("link_last_freeze_seconds", total.last_freeze_s, labels)
    out.add("link_failures_in_a_row", total.failures_in_a_row, labels)
    out.add("link_runs_total", total.runs, labels)
    out.add("link_failures_total", total.failures, labels)
    out.add("link_busy_total", total.busy, labels)
    out.add("link_resyncs_total", total.resyncs, labels)
    out.add("link_rounds_total", total.rounds, labels)
    out.add("link_changed_bytes_total", total.bytes_changed, labels)
    out.add("link_shipped_bytes_total", total.bytes_shipped, labels)
    out.add("link_zeroed_bytes_total", total.bytes_zeroed, labels)
    out.add("link_wire_bytes_total", total.bytes_wire, labels)
    out.add("link_freeze_seconds_total", total.freeze_s, labels)
