"""Header and trailer of a delta: what it is for, and where it leads. JSON of bounded size.

Keys that are not known are ignored: a minor addition needs no new version. Everything known is
checked, also on its way out: what comes from here may be printed, compared and put into a path.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from blktrack.point import Point
from blktrack.ship.delta.errors import DeltaInvalid, DeltaNewer
from blktrack.ship.delta.format import MAX_JSON, Head, Kind
from blktrack.ship.fields import LEVELS, Fields
from blktrack.ship.record import Origin

MIN_GRANULARITY = 512


@dataclass(frozen=True)
class Header:
    """What a delta is for."""

    link: str  # uuid
    source: Origin  # its size is that of the delta: no extent reaches beyond it
    granularity: int
    base: Point | None  # the point that the replica must be at; None: a full copy, no point needed
    time: float  # seconds since 1970 at which it was begun

    @property
    def size(self) -> int:
        return self.source.size

    def encode(self) -> bytes:
        """DeltaInvalid if no reader would take it."""
        value = asdict(self)
        del value["source"]["host"]
        raw = _encode(value)
        type(self).decode(raw)
        return raw

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        fields = Fields.parse(raw, "header", DeltaInvalid)
        source = fields.inner("source")
        origin = Origin(
            device=source.text("device"),
            name=source.text("name"),
            size=source.number("size", 1),
            generation=source.text("generation"),
        )
        link = fields.uuid("link")
        granularity = fields.number("granularity", MIN_GRANULARITY)
        if granularity & (granularity - 1):
            fields.refuse("granularity")
        base = None if fields.get("base") is None else _point(fields, "base")
        return cls(link, origin, granularity, base, fields.time("time"))


@dataclass
class Counts:
    """What a delta holds. Bytes of overlapping frames count once for each frame."""

    frames: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0
    discard_bytes: int = 0
    stored_bytes: int = 0  # of payloads: what data_bytes became

    def add(self, head: Head) -> None:
        self.frames += 1
        self.stored_bytes += head.stored
        match head.kind:
            case Kind.DATA:
                self.data_bytes += head.length
            case Kind.ZERO:
                self.zero_bytes += head.length
            case Kind.DISCARD:
                self.discard_bytes += head.length


@dataclass(frozen=True)
class Trailer:
    """Where a delta leads. Rounds move the point while the stream flows, so it is at the end."""

    point: Point  # that the replica holds once every frame is applied
    rounds: int
    counts: Counts

    def encode(self) -> bytes:
        """DeltaInvalid if no reader would take it."""
        raw = _encode(asdict(self))
        type(self).decode(raw)
        return raw

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        fields = Fields.parse(raw, "trailer", DeltaInvalid)
        counts = fields.inner("counts")
        return cls(
            point=_point(fields, "point"),
            rounds=fields.number("rounds"),
            counts=Counts(**{name: counts.number(name) for name in asdict(Counts())}),
        )


def _encode(value: dict[str, Any]) -> bytes:
    raw = json.dumps(value, separators=(",", ":")).encode("ascii")
    if len(raw) > MAX_JSON:
        raise DeltaInvalid(f"{len(raw)} bytes of JSON, and {MAX_JSON} are allowed")
    return raw


def _point(fields: Fields, key: str) -> Point:
    level = fields.inner(key).text("consistency")
    if level not in LEVELS:
        raise DeltaNewer(f"a point of consistency {level[:40]!r}")
    return fields.point(key)
