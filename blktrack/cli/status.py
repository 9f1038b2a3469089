"""Show devices and their replicas: state, pending bytes, lag, doubts.

blktrack status
blktrack status /dev/sdb --json
"""

from __future__ import annotations

import argparse

from blktrack.cli.common import add_json, emit, instant, store
from blktrack.report import DeviceStatus, LinkStatus, StatusReport
from blktrack.tracker.status import status
from blktrack.units import format_duration, format_size


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="only this one")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    report = StatusReport(status(store(), args.device))
    if args.json:
        emit(report)
    elif not report.devices:
        print("no device is tracked; blktrack track DEVICE begins")
    else:
        print("\n\n".join(_device(device) for device in report.devices))
    return 0


def _device(device: DeviceStatus) -> str:
    since = f" since {instant(device.since)}" if device.since else ""
    lines = [f"{device.device}  {format_size(device.size)}  {device.state}{since}"]
    if device.reason:
        lines.append(f"  reason    {device.reason}")
    if device.state == "tracking":
        lines.append(
            f"  changed   {format_size(device.dirty_bytes)} since epoch {device.epoch} began, "
            f"in granules of {format_size(device.granularity)}"
        )
        lines.append(
            f"  written   {format_size(device.written_bytes)} by {device.writes} writes, "
            f"{device.losses} lost marks"
        )
    for number, doubt in enumerate(device.doubts[:3]):
        label = "doubts" if number == 0 else ""
        lines.append(f"  {label:8}  {instant(doubt.time)}  {doubt.reason}")
    lines += [_link(link) for link in device.links]
    if not device.links:
        lines.append("  no replica yet; blktrack sync DEVICE TARGET makes one")
    return "\n".join(lines)


def _link(link: LinkStatus) -> str:
    text = f"  -> {link.target}  {link.state}"
    if link.point is not None and link.lag_s is not None:
        text += (
            f", at {instant(link.point)} ({link.consistency}), {format_duration(link.lag_s)} ago"
        )
    if link.pending_bytes is not None:
        text += f", {format_size(link.pending_bytes)} pending"
    if link.reason:
        text += f"\n     {link.reason}"
    for past in link.resyncs[:1]:
        text += f"\n     last resync {instant(past.time)}: {past.reason}"
    return text
