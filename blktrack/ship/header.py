"""What is written beside a staged increment, and what is checked of it when it is read.

Nothing is allocated by a number that was only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from blktrack.durable import plain, read_json, write_json
from blktrack.errors import BlktrackError
from blktrack.point import Point
from blktrack.ship.pack import ROW, Index, fault
from blktrack.ship.record import Record, State

INDEX, HEADER = "incoming.index", "incoming.json"
FORMAT = 1
LOST = "it was left between two points, and the increment between them is gone"
MOST_HEADER = 64 << 10  # bytes
_LEVELS = ("none", "crash", "filesystem")


class StageDamaged(BlktrackError):
    """A sealed stage is not what was sealed. `why` is a clause."""

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(
            f"the increment staged in {folder} is damaged: {why}",
            hint="run blktrack sync: it compares the replica with its source and repairs it",
        )
        self.why = why


@dataclass(frozen=True)
class Header:
    """incoming.json."""

    link: str  # uuid of the link that it is for
    base: Point  # where it starts
    point: Point  # where it leads
    size: int  # of the source, in bytes
    packed: int  # length of the pack
    extents: int  # how many
    digest: str  # of their file and of all the rest here
    written: int  # modification time of the pack, in nanoseconds: nothing writes it after the seal

    def write(self, folder: Path) -> None:
        write_json(folder / HEADER, {"format": FORMAT, **plain(self)})

    def over(self, index: bytes) -> str:
        """The digest that it should have with this file of extents."""
        rest = json.dumps(plain(replace(self, digest="")), default=plain, sort_keys=True)
        return hashlib.blake2b(rest.encode() + index, digest_size=20).hexdigest()

    def leads_from(self, record: Record) -> bool:
        """Whether it is the increment that this replica waits for, or is in the middle of."""
        if self.link != record.link or self.base != record.point:
            return False
        if record.state is State.READY:
            return True
        return record.state is State.APPLYING and self.point == record.next

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None where none is sealed. StageDamaged, or BlktrackError if a newer version wrote it."""
        path = folder / HEADER
        with contextlib.suppress(OSError):
            if path.stat().st_size > MOST_HEADER:
                raise StageDamaged(folder, f"{HEADER} is too long")
        try:
            value = read_json(path)
        except (BlktrackError, RecursionError) as error:
            raise StageDamaged(folder, str(error)) from error
        if value is None:
            return None
        try:
            if number(value, "format") > FORMAT:
                raise BlktrackError(
                    f"{path} was written by a newer blktrack", hint="upgrade blktrack on this host"
                )
            return cls(
                link=text(value, "link"),
                base=point_of(value["base"]),
                point=point_of(value["point"]),
                size=number(value, "size"),
                packed=number(value, "packed"),
                extents=number(value, "extents"),
                digest=text(value, "digest"),
                written=number(value, "written"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StageDamaged(folder, f"{HEADER}: {error!r}") from error


def read_index(folder: Path, header: Header) -> Index:
    """What the pack holds and where, resolved. StageDamaged."""
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length != header.extents * ROW:
                raise StageDamaged(folder, f"{INDEX} has not {header.extents} extents")
            data = file.read(length)
    except OSError as error:
        raise StageDamaged(folder, f"{INDEX}: {error.strerror}") from error
    if header.over(data) != header.digest:
        raise StageDamaged(folder, f"{HEADER} and {INDEX} have another digest")
    index = np.frombuffer(data, dtype="<i8").astype(np.int64).reshape(-1, 3)
    if why := fault(index, header.size, header.packed):
        raise StageDamaged(folder, why)
    return index


def number(value: dict[str, Any], key: str) -> int:
    found = value[key]
    if type(found) is not int or not 0 <= found < 1 << 63:
        raise ValueError(f"{key} is {str(found)[:40]!r}")
    return found


def text(value: dict[str, Any], key: str) -> str:
    found = value[key]
    if not isinstance(found, str):
        raise ValueError(f"{key} is {str(found)[:40]!r}")
    return found


def point_of(value: dict[str, Any]) -> Point:
    time, level = value["time"], value["consistency"]
    if not isinstance(time, int | float) or not math.isfinite(time):
        raise ValueError("a point has no time")
    if level not in _LEVELS:
        raise ValueError("a point has no consistency")
    return Point(number(value, "epoch"), text(value, "generation"), time, level)
