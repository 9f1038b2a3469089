"""Results as data: text, JSON and live displays are views of these. Field names are the JSON keys.

Sizes are bytes, times seconds (instants since the epoch); extents are [start, length] pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class Past(Report):
    """A doubt and when it was found."""

    reason: str
    time: float


@dataclass
class LastRun(Report):
    """The last run of a link, however it ended."""

    begun: float
    duration_s: float
    exit: int
    error: str
    mode: str  # "" if it failed
    bytes_shipped: int
    bytes_wire: int  # that crossed the network, also if it failed
    rate: float | None  # bytes a second: of the network, if there is one, or shipped; None: nothing


@dataclass
class LinkStatus(Report):
    target: str  # "": streams
    name: str
    epoch: int | None  # of the cursor
    point: float | None  # the instant whose state the replica holds; None while it holds none
    consistency: str | None
    lag_s: float | None
    pending_bytes: int | None  # None: not known, the device is away or has a gap
    state: str  # initial, ready, resync, unfinished
    reason: str  # why it is not ready
    rpo_s: float | None = None  # from which lag on it is late; None: nothing is promised
    lateness: str = ""  # ok, late, broken
    resyncs: list[Past] = field(default_factory=list)  # reason and time, newest first
    route: str = ""  # to another host, when it was last reached
    held_bytes: int | None = None  # of those pending: durable there, in what is no point yet
    last_run: LastRun | None = None
    last_error: Past | None = None  # of the last run that failed, however long that is ago


@dataclass
class DeviceStatus(Report):
    device: str
    size: int
    granularity: int
    state: str  # tracking, gap, absent
    reason: str  # why not tracking
    since: float | None  # when that began
    generation: str
    epoch: int
    dirty_bytes: int  # changed since the last drain
    written_bytes: int  # since the generation began
    writes: int
    losses: int  # marks that were lost, of any kind
    doubts: list[Past] = field(default_factory=list)
    links: list[LinkStatus] = field(default_factory=list)


@dataclass
class StatusReport(Report):
    devices: list[DeviceStatus]
    replicas: list[ReplicaStatus] = field(default_factory=list)


@dataclass
class SyncReport(Report):
    mode: str  # initial, incremental, resync, nothing
    reason: str
    consistency: str
    epoch: int
    point: float
    rounds: int
    extents: int
    bytes_changed: int  # in the extents that had to be looked at
    bytes_shipped: int  # written to the replica
    bytes_zeroed: int  # made zero on the replica, without data
    bytes_wire: int  # sent to another host
    freeze_s: float
    duration_s: float


@dataclass
class LinkOutcome(Report):
    """What became of one replica in `sync --all`."""

    device: str  # path
    name: str  # "data.nas": of the device and of the replica, in the policy
    target: str
    exit: int
    error: str  # "" if it was synced
    hint: str
    report: SyncReport | None  # None if it was not
    warnings: list[str]
    point: float | None  # that its last successful sync reached, this one or an earlier one
    lag_s: float | None
    rpo_s: float | None  # from which lag on it is late; None: nothing is promised
    lateness: str  # ok, late, broken; "" where nothing is promised


@dataclass
class FleetReport(Report):
    links: list[LinkOutcome]  # in the order of the policy
    exit: int  # the worst
    duration_s: float


@dataclass
class SendReport(Report):
    link: str
    mode: str  # initial, incremental, resync: all of it again, nothing
    reason: str
    base: int | None  # the epoch that the receiver has to be at; None: any, all of it is sent
    epoch: int  # to be committed once the receiver has it
    point: float
    consistency: str
    rounds: int
    extents: int
    bytes_changed: int
    bytes_shipped: int
    bytes_zeroed: int
    bytes_wire: int  # of the stream
    freeze_s: float
    duration_s: float


@dataclass
class Totals(Report):
    """Of all runs of a link, those included that its history no longer has."""

    runs: int = 0
    busy: int = 0  # gave way to a run that had not ended
    failures: int = 0  # other runs that ended without a point
    failures_in_a_row: int = 0  # since the last success
    resyncs: int = 0
    rounds: int = 0
    bytes_changed: int = 0
    bytes_shipped: int = 0
    bytes_zeroed: int = 0
    bytes_wire: int = 0
    freeze_s: float = 0.0
    last_freeze_s: float = 0.0  # of the last success
    succeeded: float | None = None  # when that ended


@dataclass
class Run(Report):
    """What one `sync` or `send` did. Of one that failed no figures are known but `bytes_wire`."""

    command: str
    link: str  # name; "" if it failed before there was one
    target: str  # "": a stream
    begun: float
    duration_s: float
    exit: int
    error: str
    mode: str = ""
    reason: str = ""
    consistency: str = ""
    epoch: int | None = None
    point: float | None = None
    rounds: int = 0
    extents: int = 0
    bytes_changed: int = 0
    bytes_shipped: int = 0
    bytes_zeroed: int = 0
    bytes_wire: int = 0
    freeze_s: float = 0.0
    totals: Totals = field(default_factory=Totals)  # up to this run


@dataclass
class HistoryReport(Report):
    device: str
    runs: list[Run]  # newest last
    damaged: int  # lines of the history that could not be read


@dataclass
class CommitReport(Report):
    link: str
    epoch: int
    point: float
    consistency: str


@dataclass
class RecvReport(Report):
    target: str
    link: str  # uuid
    source: str  # the device, as its host calls it
    mode: str  # initial: all of it, incremental
    epoch: int  # for blktrack send --commit
    point: float
    consistency: str
    extents: int
    bytes_changed: int
    bytes_shipped: int
    bytes_zeroed: int
    bytes_wire: int  # of the stream
    duration_s: float = 0.0


@dataclass
class ReplicaStatus(Report):
    target: str
    source: str  # the device, as its host calls it
    link: str  # uuid
    state: (
        str  # ready, waiting: at its point and another is complete; unfinished, applying, changed
    )
    reason: str  # why it is at no point
    epoch: int | None
    point: float | None
    consistency: str | None
    next_epoch: int | None  # of what is complete and waits
    next_point: float | None


@dataclass
class ExtentsReport(Report):
    device: str
    granularity: int
    generation: str
    epoch: int
    bytes: int
    extents: list[list[int]]


@dataclass
class VerifyReport(Report):
    bytes_compared: int
    bytes_different: int
    bytes_repaired: int
    extents: list[list[int]]


@dataclass
class TrackReport(Report):
    device: str
    size: int
    granularity: int
    generation: str
    began: bool  # False: it was tracked already
    kernel_bytes: int  # memory of its dirty maps
    warnings: list[str] = field(default_factory=list)


@dataclass
class Check(Report):
    name: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass
class Probed(Report):
    """One way of changing a scratch device, and whether all of it was seen."""

    name: str
    result: str  # passed, failed, not here: the kernel or the device has nothing of the kind
    reason: str  # why not passed


@dataclass
class ProbedKind(Report):
    kind: str  # loop, zram, null_blk, dm
    based: str  # request or bio: what shows the changes of such a device
    verdict: str  # trusted, not trusted, not probed
    reason: str  # why not trusted, or not probed
    probes: list[Probed]


@dataclass
class ProbeReport(Report):
    ok: bool  # all that is here passed
    duration_s: float
    kinds: list[ProbedKind]


@dataclass
class DoctorReport(Report):
    ok: bool
    kernel: str
    checks: list[Check]
    probe: ProbeReport | None = None  # None: it was not asked for, or a check failed that it needs


@dataclass
class Finding(Report):
    """One thing in the policy file that cannot be followed, or not on this host."""

    key: str  # "device.data.replica.nas.target"; "" for the file as a whole
    message: str
    hint: str


@dataclass
class PolicyReport(Report):
    file: str
    ok: bool  # it can be followed
    devices: int
    replicas: int
    errors: list[Finding]
    warnings: list[Finding]


@dataclass
class DeviceAction(Report):
    """What `start` or `stop` did."""

    device: str
    # stopped, in use, gap, let go; resumed, tracking, began; absent, busy, failed
    action: str
    reason: str
    hint: str = ""  # what to do about it


@dataclass
class ServiceReport(Report):
    devices: list[DeviceAction]


@dataclass
class TopLink(Report):
    target: str  # "": streams
    name: str
    state: str  # as in LinkStatus
    reason: str
    epoch: int | None
    point: float | None
    consistency: str | None
    lag_s: float | None
    rpo_s: float | None  # of the policy; None: it promises nothing
    lateness: str  # of the lag by the policy: ok, late, broken; "": it promises nothing
    pending_bytes: int | None  # None: not known
    sync_rate: float | None  # bytes a second of its last sync that shipped anything
    eta_s: float | None  # for what is pending, at that rate
    route: str = ""  # as in LinkStatus
    failed: Past | None = None  # why and when its last run did; None: it went well, or gave way


@dataclass
class TopDevice(Report):
    """Rates are means since the reading before; None: there is none to compare with."""

    device: str
    size: int
    granularity: int
    state: str  # tracking, gap, absent, stopped
    reason: str  # why not tracking
    generation: str
    epoch: int
    write_rate: float | None  # bytes a second
    writes_rate: float | None  # writes a second
    dirty_rate: float | None  # granules that became dirty a second; at least so many
    dirty_bytes: int | None  # changed since the last drain
    written_bytes: int  # since the generation began
    writes: int
    losses: int
    cost_ns: float | None  # of both programs for a change; None: the kernel does not time them
    heat: list[float]  # share dirty of each of up to 256 equal parts: what any link has to ship
    links: list[TopLink] = field(default_factory=list)


@dataclass
class TopReport(Report):
    """One look at everything that is tracked."""

    time: float
    interval_s: float | None  # since the reading before
    programs_share: float | None  # of one CPU, by the programs; None: the kernel does not time them
    devices: list[TopDevice]
