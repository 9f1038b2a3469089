"""Header and trailer of a delta: what it is for, and where it leads. JSON of bounded size.

Keys that are not known are ignored: a minor addition needs no new version. Everything known is
checked, also on its way out: what comes from here may be printed, compared and put into a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Self

from blktrack.point import Point
from blktrack.ship.delta.errors import DeltaInvalid, DeltaNewer
from blktrack.ship.delta.format import MAX_JSON, MAX_NUMBER, Head, Kind
from blktrack.ship.record import Origin

MAX_TEXT = 4096  # characters
MAX_TIME = 253402300799  # the last second of the year 9999
MIN_GRANULARITY = 512
CONSISTENCIES = ("none", "crash", "filesystem")

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


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
        raw = _encode(asdict(self))
        type(self).decode(raw)
        return raw

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        fields = _Fields.parse(raw, "header")
        source = fields.inner("source")
        origin = Origin(
            device=source.text("device"),
            name=source.text("name"),
            size=source.number("size", 1),
            generation=source.text("generation"),
        )
        link = fields.text("link")
        if not _UUID.fullmatch(link):
            fields.refuse("link")
        granularity = fields.number("granularity", MIN_GRANULARITY)
        if granularity & (granularity - 1):
            fields.refuse("granularity")
        base = None if fields.get("base") is None else _point(fields.inner("base"))
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
        fields = _Fields.parse(raw, "trailer")
        counts = fields.inner("counts")
        return cls(
            point=_point(fields.inner("point")),
            rounds=fields.number("rounds"),
            counts=Counts(**{name: counts.number(name) for name in asdict(Counts())}),
        )


def _encode(value: dict[str, Any]) -> bytes:
    raw = json.dumps(value, separators=(",", ":")).encode("ascii")
    if len(raw) > MAX_JSON:
        raise DeltaInvalid(f"{len(raw)} bytes of JSON, and {MAX_JSON} are allowed")
    return raw


def _point(fields: _Fields) -> Point:
    consistency = fields.text("consistency")
    if consistency not in CONSISTENCIES:
        raise DeltaNewer(f"a point of consistency {consistency[:40]!r}")
    return Point(
        epoch=fields.number("epoch"),
        generation=fields.text("generation"),
        time=fields.time("time"),
        consistency=consistency,
    )


class _Fields:
    """A JSON object of which each value is checked when it is taken."""

    def __init__(self, value: dict[str, Any], where: str) -> None:
        self._value = value
        self._where = where

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Self:
        try:
            # Not json.loads(raw): that would take UTF-16 and UTF-32 too.
            value = json.loads(
                raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
            )
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise DeltaInvalid(f"its {where} is not a JSON object in UTF-8 with unique keys")
        return cls(value, where)

    def get(self, key: str) -> object:
        if key not in self._value:
            raise DeltaInvalid(f"its {self._where} has no {key!r}")
        value: object = self._value[key]
        return value

    def refuse(self, key: str) -> NoReturn:
        raise DeltaInvalid(f"its {self._where} has a bad {key!r}")

    def inner(self, key: str) -> _Fields:
        value = self.get(key)
        if not isinstance(value, dict):
            self.refuse(key)
        return _Fields(value, f"{self._where}'s {key}")

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or len(value) > MAX_TEXT or _UNPRINTABLE.search(value):
            self.refuse(key)
        return value

    def number(self, key: str, low: int = 0) -> int:
        value = self.get(key)
        if type(value) is not int or not low <= value <= MAX_NUMBER:
            self.refuse(key)
        return value

    def time(self, key: str) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not isinstance(value, int | float):
            self.refuse(key)
        if not 0 <= value <= MAX_TIME:  # what json makes of 1e999 is not
            self.refuse(key)
        return float(value)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError("a key is there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
