"""What became of a link, and what that means for what its policy promises."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from blktrack.errors import BlktrackError
from blktrack.policy import DevicePolicy, LinkPolicy, Policy
from blktrack.report import LinkOutcome
from blktrack.state import Store
from blktrack.told import Trouble

# Exit codes from the least to the worst: what is busy is only late, what has no point is tried
# again, and what needs a decision or a repair is worse than either. Signals are above all.
_WORSE = (0, 6, 4, 3, 2, 1)


@dataclass(frozen=True)
class Job:
    """An enabled replica of the policy."""

    device: DevicePolicy
    link: LinkPolicy

    @property
    def name(self) -> str:
        return f"{self.device.name}.{self.link.name}"


def jobs_of(policy: Policy) -> list[Job]:
    """Every enabled replica, in the order of the file."""
    return [Job(device, link) for device in policy.devices for link in device.links if link.enabled]


def worst(codes: Iterable[int]) -> int:
    """The exit code of all of these: a signal, else the first there is of 1, 2, 3, 4, 6, 0."""
    return max(codes, key=lambda code: (code > 128, _WORSE.index(code) if code in _WORSE else 9))


def outcome(job: Job) -> LinkOutcome:
    """Of a link that was not synced yet."""
    return LinkOutcome(
        device=job.device.path,
        name=job.name,
        target=job.link.target,
        exit=0,
        error="",
        hint="",
        report=None,
        warnings=[],
        point=None,
        lag_s=None,
        rpo_s=job.link.rpo_warning,
        lateness="",
    )


def judge(store: Store, jobs: Iterable[Job], outcomes: Iterable[LinkOutcome]) -> None:
    """Hold what the replicas have now against what was promised of them."""
    points = last_points(store)
    now = time.time()
    for job, found in zip(jobs, outcomes, strict=True):
        found.point = points.get(job.link.target)
        found.lag_s = None if found.point is None else now - found.point
        found.lateness = job.link.lateness(found.lag_s)


def last_points(store: Store) -> dict[str, float]:
    """By target: a replica has one whatever its device is called now, and if it is away, too."""
    newest: dict[str, float] = {}
    try:
        for state in store.devices():
            for link in store.links(state.id):
                if link.cursor is not None:
                    newest[link.target] = max(newest.get(link.target, 0.0), link.cursor.time)
    except BlktrackError:
        pass  # the link whose state it is has said so
    return newest


def trouble(found: LinkOutcome) -> Trouble | None:
    """What the operator has to know of a link; None if it is well."""
    words = [found.error] if found.exit else []
    if found.lateness == "broken":
        words.append("its promise is broken")
    words += found.warnings
    return Trouble(found.exit, "; ".join(words)) if words else None
