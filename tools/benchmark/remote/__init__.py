"""A replica on another host: bytes and time over links that are long, narrow and bad."""

from __future__ import annotations

from collections.abc import Iterator

from tools.benchmark.figure import Figure
from tools.benchmark.lab import Lab
from tools.benchmark.remote import against, level, limit, long

NAMES = ("remote-sync", "remote-long", "remote-limit", "remote-level")
_PARTS = dict(zip(NAMES, (against, long, limit, level), strict=True))


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    for name, part in _PARTS.items():
        if name in wanted:
            yield from part.measure(lab, name, quick=quick)
