"""A state of the source that a replica holds, as links and replicas record it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A state of the source that the replica holds."""

    epoch: int
    generation: str
    time: float  # seconds since 1970 at which the source was so
    consistency: str  # "none", "crash" or "filesystem"
