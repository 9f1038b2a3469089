"""A report as plain lines, for logs and pipes: each says all that it is about."""

from __future__ import annotations

from blktrack.report import TopDevice, TopLink, TopReport
from blktrack.tui import words
from blktrack.tui.look import clean
from blktrack.units import format_size


def lines(report: TopReport) -> list[str]:
    """A line for each device and each link, under one with the time."""
    at = words.clock(report.time, report.time)
    if not report.devices:
        return [f"{at}  no device is tracked; blktrack track DEVICE begins"]
    found = ["  ".join([at, words.summary(report), *words.rates(report)])]
    for device in report.devices:
        found.append(_device(device))
        found += [_link(link, report.time) for link in device.links]
    return found


def _device(device: TopDevice) -> str:
    name = f"{clean(device.device)}  {format_size(device.size)}  {device.state}"
    if device.state != "tracking":
        return f"{name}  {clean(device.reason)}"
    parts = []
    if device.write_rate is not None:
        parts.append(
            f"{format_size(device.write_rate)}/s in {words.number(device.writes_rate)} writes/s"
        )
    if device.dirty_rate is not None:
        granules = f"{format_size(device.granularity)} granules/s"
        parts.append(f"{words.number(device.dirty_rate)} dirty {granules}")
    parts += [f"{words.size(device.dirty_bytes)} dirty", f"{device.losses} lost"]
    if device.cost_ns is not None:
        parts.append(f"{words.nanoseconds(device.cost_ns)} a change")
    return f"{name}  {', '.join(parts)}"


def _link(link: TopLink, now: float) -> str:
    text = f"  -> {clean(link.target or f'link {link.name}')}  {link.state}"
    if link.point is not None:
        text += f"  lag {words.age(link.lag_s)}"
        if link.rpo_s is not None:
            text += f" of {words.age(link.rpo_s)}"
        if link.lateness in ("late", "broken"):
            text += f" ({'late' if link.lateness == 'late' else 'RPO broken'})"
        text += (
            f", point {words.clock(link.point, link.point + (link.lag_s or 0))} {link.consistency}"
        )
    if link.pending_bytes is not None:
        text += f", {format_size(link.pending_bytes)} to go"
        if link.eta_s is not None:
            text += f" in {words.age(link.eta_s)}"
    below = [link.reason, words.failure(link, now)]
    return "\n     ".join([text, *(clean(part) for part in below if part)])
