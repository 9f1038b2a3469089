"""Numbers as short as a column, and what is said of a device and a link."""

from __future__ import annotations

import time
from typing import NamedTuple

from blktrack.report import TopDevice, TopLink, TopReport
from blktrack.units import format_size

UNKNOWN = "-"
# From best to worst.
GOOD, LATE, BAD = 0, 1, 2

STATES = {"unfinished": "half-way"}  # those that are too long for a column


def number(value: float | None) -> str:
    """`0`, `0.2`, `812`, `3.1k`, `12k`, `1.2M`."""
    if value is None:
        return UNKNOWN
    if 0 < value < 9.95:
        text = f"{value:.1f}"
        return text.removesuffix(".0") if value >= 0.05 else "<0.1"
    for suffix in ("", "k", "M", "G"):
        if value < 999.5 or suffix == "G":
            return f"{value:.1f}{suffix}" if suffix and value < 9.95 else f"{value:.0f}{suffix}"
        value /= 1000
    raise AssertionError("unreachable")


def size(value: float | None) -> str:
    return UNKNOWN if value is None else format_size(value)


def age(seconds: float | None) -> str:
    """`12 s`, `3:05`, `2:03:05`, `3 d 4 h`."""
    if seconds is None:
        return UNKNOWN
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, secs = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{secs:02}"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02}:{secs:02}"
    return f"{hours // 24} d {hours % 24} h"


def nanoseconds(value: float | None) -> str:
    return (
        UNKNOWN
        if value is None
        else f"{value:.0f} ns"
        if value < 9999.5
        else f"{value / 1e3:.0f} us"
    )


def clock(instant: float | None, now: float) -> str:
    """The time of day, or the day if that was not within the last one."""
    if instant is None:
        return UNKNOWN
    style = "%H:%M:%S" if abs(now - instant) < 86400 - 60 else "%d %b"
    return time.strftime(style, time.localtime(instant))


def rank_of_link(link: TopLink) -> int:
    """How well it stands: its replica, its lag against what was promised, and its last run."""
    if link.lateness == "broken" or link.state in ("resync", "unfinished"):
        return BAD
    late = link.lateness == "late" or link.state == "initial" or link.failed is not None
    return LATE if late else GOOD


def failure(link: TopLink, now: float) -> str:
    """What became of its last run; "" if nothing bad did."""
    failed = link.failed
    return "" if failed is None else f"failed {clock(failed.time, now)}: {failed.reason}"


class Verdict(NamedTuple):
    rank: int
    text: str  # eight letters at most


def own_verdict(device: TopDevice) -> Verdict:
    rank = {"tracking": GOOD, "stopped": LATE}.get(device.state, BAD)
    return Verdict(BAD if device.losses else rank, device.state)


def verdict(device: TopDevice) -> Verdict:
    """The worst of a device and its links."""
    return max([own_verdict(device), *map(_of_link, device.links)], key=lambda found: found.rank)


def _of_link(link: TopLink) -> Verdict:
    rank = rank_of_link(link)
    lag = {"broken": "over RPO", "late": "late"}.get(link.lateness, "")
    bad = link.state in ("resync", "unfinished", "initial")
    return Verdict(rank, STATES.get(link.state, link.state) if bad or not lag else lag)


def summary(report: TopReport) -> str:
    """`3 devices, 1 gap, 1 link late`."""
    count = len(report.devices)
    parts = [f"{count} device{'s' * (count != 1)}"]
    for state in ("gap", "absent", "stopped"):
        if some := sum(device.state == state for device in report.devices):
            parts.append(f"{some} {state}")
    links = [link for device in report.devices for link in device.links]
    for lateness in ("broken", "late"):
        if some := sum(link.lateness == lateness for link in links):
            parts.append(
                f"{some} link{'s' * (some != 1)} {'over RPO' if lateness == 'broken' else lateness}"
            )
    return ", ".join(parts)


def rates(report: TopReport) -> list[str]:
    """What all devices together do, and what that costs."""
    known = [device for device in report.devices if device.write_rate is not None]
    if not known:
        return []
    written = sum(device.write_rate or 0 for device in known)
    writes = sum(device.writes_rate or 0 for device in known)
    parts = [f"{format_size(written)}/s", f"{number(writes)} writes/s"]
    if report.programs_share is not None:
        parts.append(f"programs {100 * report.programs_share:.2f} % of a CPU")
    return parts
