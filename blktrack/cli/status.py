"""Show devices and their replicas: state, pending bytes, lag, doubts. Of a replica, the point that
it holds; one that is complete beside it is applied first.

  blktrack status
  blktrack status /dev/sdb --json
  blktrack status /backup/sdb.img
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator

from blktrack.cli.common import add_json, emit, instant, paths, store
from blktrack.cli.progress import Watcher
from blktrack.errors import NotTracked, UsageError
from blktrack.policy import PolicyError, load
from blktrack.policy.measure import measure
from blktrack.report import DeviceStatus, LinkStatus, ReplicaStatus, StatusReport
from blktrack.ship.address import Address, is_remote
from blktrack.ship.tell import replica_status
from blktrack.tracker.status import status
from blktrack.units import format_duration, format_promise, format_size

EXITS = {
    "3": "the device is not tracked, and the file no replica",
    "6": "busy: another run holds the device",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "device", metavar="DEVICE", nargs="?", help="only this one: a device, or a replica"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    report = _look(args.device)
    if args.json:
        emit(report)
    elif not report.devices and not report.replicas:
        print("no device is tracked; blktrack track DEVICE begins")
    else:
        told = [_device(device) for device in report.devices]
        print("\n\n".join(told + [_replica(replica) for replica in report.replicas]))
    return 0


def _look(name: str | None) -> StatusReport:
    """A device may be both a source and a replica."""
    replica = None
    if name and is_remote(name):
        address = Address.parse(name)
        raise UsageError(
            f"{name} is on another host: its state is shown there",
            hint=f"run blktrack status {shlex.quote(address.path)} on {address.name}; what is known"
            " of it here is shown with its device",
        )
    if name:
        with Watcher(quiet=False) as watcher:
            replica = replica_status(os.path.abspath(name), paths(), watcher)
    replicas = [replica] if replica else []
    try:
        devices = status(store(), name)
    except NotTracked as error:
        if not replicas:
            raise NotTracked(f"{name} is not tracked, and no replica", hint=error.hint) from error
        return StatusReport([], replicas)
    try:
        measure(devices, load(paths().policy))
    except PolicyError as error:
        print(f"blktrack: warning: {error}", file=sys.stderr)
    return StatusReport(devices, replicas)


def _replica(replica: ReplicaStatus) -> str:
    text = f"{replica.target}  replica of {replica.source}  {replica.state}"
    if replica.point is not None:
        left = "last " if replica.state in ("changed", "applying") else ""
        text += (
            f"\n  {left}point  {instant(replica.point)}, epoch {replica.epoch},"
            f" consistency {replica.consistency}"
        )
    if replica.next_point is not None:
        text += f"\n  next   {instant(replica.next_point)}, epoch {replica.next_epoch}"
    if replica.reason:
        text += f"\n  {replica.reason}"
    return text


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
    text = f"  -> {link.target or f'link {link.name}'}  {link.state}"
    if link.point is not None and link.lag_s is not None:
        text += (
            f", at {instant(link.point)} ({link.consistency}), {format_duration(link.lag_s)} ago"
        )
    if link.lateness in ("late", "broken") and link.rpo_s is not None:
        text += f", {link.lateness.upper()}: promised {format_promise(link.rpo_s)}"
    if link.pending_bytes is not None:
        text += f", {format_size(link.pending_bytes)} pending"
    if link.held_bytes:
        text += f", {format_size(link.held_bytes)} of it there already"
    below = [link.reason] if link.reason else []
    below += [f"last resync {instant(past.time)}: {past.reason}" for past in link.resyncs[:1]]
    if is_remote(link.target):
        below += _over_the_network(link)
    return "\n     ".join([text, *below])


def _over_the_network(link: LinkStatus) -> Iterator[str]:
    """What its last runs met there: nothing is asked for now."""
    if link.route:
        yield f"route {link.route}"
    if run := link.last_run:
        text = f"last run {instant(run.begun)}: {run.mode or 'failed'}"
        if run.rate is not None:
            text += f", {format_size(run.bytes_wire)} over the network at {format_size(run.rate)}/s"
        yield f"{text}, {format_duration(run.duration_s)}"
    if past := link.last_error:
        yield f"last error {instant(past.time)}: {past.reason}"
