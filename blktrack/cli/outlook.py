"""What `top` says of a link beyond its state: what is promised of it, how long a sync will take."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from blktrack import history
from blktrack.errors import BlktrackError, Busy
from blktrack.policy import Policy, PolicyError, load
from blktrack.policy.measure import measure
from blktrack.report import Past, Run, TopDevice, TopLink, TopReport
from blktrack.state import Store
from blktrack.units import MIB

_RUNS = 50  # looked at, of a device
_ALIKE = 64 * MIB  # a run of so much tells the rate of any
_FALLING = 10.0  # seconds over which the rate of a sync under way is taken

Stamp = tuple[int, int, int] | None


@dataclass
class _Runs:
    """What the latest runs of a device tell."""

    moved: list[Run] = field(
        default_factory=list
    )  # that shipped or compared anything, newest first
    failed: dict[history.Key, Past] = field(default_factory=dict)  # links whose last run did

    @classmethod
    def of(cls, found: list[Run]) -> Self:
        """Of these, newest first."""
        last: dict[history.Key, Run] = {}
        for run in found:
            if run.exit != Busy.exit_code:
                last.setdefault(history.key(run.link, run.target), run)
        return cls(
            [run for run in found if not run.exit and _moved(run) and run.duration_s],
            {
                its: Past(run.error, run.begun + run.duration_s)
                for its, run in last.items()
                if run.exit
            },
        )


class Outlook:
    """Files are read again only when they were written."""

    def __init__(self, store: Store, policy: Path) -> None:
        self._store, self._file = store, policy
        self._policy: Policy | None = None
        self._stamp: Stamp | tuple[()] = ()
        self._runs: dict[str, tuple[Stamp, _Runs]] = {}
        self._falling: dict[tuple[str, str, str], tuple[float, int]] = {}
        self.problem = ""  # of the policy

    def tell(self, report: TopReport, ids: dict[str, str]) -> None:
        """Complete the links of a report; `ids` are those of its devices, by path."""
        stamp = _stamp(self._file)
        if stamp != self._stamp:
            self._stamp, self.problem = stamp, ""
            try:
                self._policy = load(self._file)
            except PolicyError as error:
                self._policy, self.problem = None, str(error)
        if self._policy is not None:
            measure(report.devices, self._policy)
        for device in report.devices:
            known = device.device in ids and device.links
            runs = self._read(ids[device.device]) if known else _Runs()
            for link in device.links:
                self._estimate(report.time, device, link, runs.moved)
                link.failed = runs.failed.get(_key(link))

    def _read(self, device: str) -> _Runs:
        stamp = _stamp(self._store.lib(device) / "history.jsonl")
        known = self._runs.get(device)
        if known is None or known[0] != stamp:
            try:
                found = list(itertools.islice(history.newest_first(self._store, device), _RUNS))
            except BlktrackError:  # `blktrack history` says what is wrong with it
                found = []
            self._runs[device] = known = (stamp, _Runs.of(found))
        return known[1]

    def _estimate(self, now: float, device: TopDevice, link: TopLink, runs: list[Run]) -> None:
        own = [run for run in runs if history.key(run.link, run.target) == _key(link)]
        link.sync_rate = _rate(own[0]) if own else None
        left = link.pending_bytes
        if not left:
            link.eta_s = None if left is None else 0.0
            return
        present = self._present(now, (device.device, *_key(link)), left)
        # What a run takes to begin and end would make a rate of a short one, and that no estimate.
        alike = (run for run in own if _moved(run) >= min(left // 4, _ALIKE))
        rate = present or next(map(_rate, alike), None)
        link.eta_s = left / rate if rate else None

    def _present(self, now: float, link: tuple[str, str, str], left: int) -> float | None:
        """Bytes a second by which what is left became less: a full copy or resync is under way."""
        begun, then = self._falling.get(link, (now, left))
        if left >= then or now - begun > 2 * _FALLING:
            self._falling[link] = (now, left)
            return None
        rate = (then - left) / (now - begun) if now > begun else None
        if now - begun > _FALLING and rate:
            self._falling[link] = (now - _FALLING / 2, int(left + rate * _FALLING / 2))
        return rate


def _key(link: TopLink) -> history.Key:
    return history.key(link.name, link.target)


def _rate(run: Run) -> float:
    return _moved(run) / run.duration_s


def _moved(run: Run) -> int:
    """Bytes that took its time: what was zero or never written goes by at another rate."""
    return run.bytes_changed if run.mode == "resync" else run.bytes_shipped


def _stamp(path: Path) -> Stamp:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size
