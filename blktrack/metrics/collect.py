"""Gathering the figures of all devices and links, without getting in the way of a sync."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from blktrack import __version__
from blktrack.bpf.kernel import Detached, Kernel
from blktrack.errors import BlktrackError
from blktrack.metrics.devices import add_kernel, add_programs, add_status
from blktrack.metrics.links import Places, add_links, add_planned
from blktrack.metrics.names import CATALOGUE, PREFIX
from blktrack.metrics.text import Exposition
from blktrack.policy import Policy, PolicyError, load
from blktrack.report import DeviceStatus
from blktrack.state import DeviceState, Store
from blktrack.tracker.status import glance, status_of
from blktrack.tracker.tracker import present

_PATIENCE = 2.0  # seconds for the lock of a device, held while a sync closes an epoch


@dataclass
class Figures:
    text: bytes
    warnings: list[str]  # why some are missing


def collect(store: Store, wait: float = _PATIENCE) -> Figures:
    """All figures that can be had. For the lock of a device it waits so many seconds."""
    return _Collector(store, wait).run()


@dataclass
class _Collector:
    store: Store
    wait: float
    out: Exposition = field(default_factory=lambda: Exposition(CATALOGUE, PREFIX))
    warnings: list[str] = field(default_factory=list)

    def run(self) -> Figures:
        at, begun = time.time(), time.monotonic()
        policy = self._policy()
        kernel = None
        try:
            kernel = Kernel(self.store.paths.pins)
            add_programs(self.out, kernel)
        except Detached:
            pass  # nothing is tracked, or each device says that it no longer is
        except (BlktrackError, OSError) as error:
            self.warnings.append(f"without what the kernel knows: {error}")
        places = Places(policy)
        try:
            for number in self.store.ids():
                self._device(number, kernel, places)
        finally:
            if kernel is not None:
                kernel.close()
        add_planned(self.out, places)
        versions = {"version": __version__, "kernel": os.uname().release}
        self.out.add("build_info", 1, versions)
        self.out.add("up", not self.warnings, {})
        self.out.add("collected_timestamp_seconds", at, {})
        self.out.add("collect_duration_seconds", time.monotonic() - begun, {})
        return Figures(self.out.text, self.warnings)

    def _policy(self) -> Policy:
        try:
            policy = load(self.store.paths.policy)
        except PolicyError as error:
            policy = Policy(self.store.paths.policy, exists=False)
            self.warnings.append(f"without what the policy promises: {error}")
        self.out.add("policy_valid", not self.warnings, {})
        return policy

    def _device(self, number: str, kernel: Kernel | None, places: Places) -> None:
        labels = {"device": number}
        try:
            state = self.store.device(number)
            if state is None or not state.wanted:
                return
            labels = {"device": state.path, "name": state.name}
            status = self._status(state)
            if status is not None:
                labels["device"] = status.device
                add_status(self.out, status, labels)
            self.out.add("device_up", status is not None, labels)
            add_kernel(self.out, state, kernel, labels)
            places.add(labels)
            links = status.links if status is not None else glance(self.store, state)
            self.warnings += add_links(
                self.out, self.store, state, links, places=places, device=labels
            )
        except (BlktrackError, OSError) as error:
            self.out.add("device_up", 0, labels)
            self.warnings.append(str(error))

    def _status(self, state: DeviceState) -> DeviceStatus | None:
        try:
            return status_of(self.store, state, present(state), self.wait)
        except (BlktrackError, OSError) as error:
            self.warnings.append(str(error))
            return None
