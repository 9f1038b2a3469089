"""What is promised of each link, beside what is."""

from __future__ import annotations

from collections.abc import Iterable

from blktrack.policy.model import Policy
from blktrack.report import DeviceStatus, TopDevice


def measure(devices: Iterable[DeviceStatus | TopDevice], policy: Policy) -> None:
    """Note RPO and lateness in the links of `devices` that the policy knows."""
    for device in devices:
        for link in device.links:
            promise = policy.link(device.device, link.target) if link.target else None
            if promise is not None:
                link.rpo_s = promise.rpo_warning
                link.lateness = promise.lateness(link.lag_s)
