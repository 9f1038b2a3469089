"""What is kept beside a replica: whose it is, at which point, and what it looked like then."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from blktrack.durable import plain, read_json, write_json
from blktrack.errors import BlktrackError
from blktrack.point import Point
from blktrack.ship.endpoint import Endpoint
from blktrack.sysfs import BlockDevice, boot_id

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")

FORMAT = 1
_EDGE = 64 << 10  # bytes of both ends that a digest covers: where signatures and super blocks are


class State(enum.StrEnum):
    """What the bytes of a replica are."""

    UNFINISHED = "unfinished"  # no point: an initial copy or a resync has not ended
    APPLYING = "applying"  # between its point and the next
    READY = "ready"  # its point


@dataclass(frozen=True)
class Origin:
    """The source, so that it is known again."""

    device: str  # path
    name: str  # BlockDevice.permanent_name
    size: int
    generation: str
    host: str = ""  # `host_id` of the one that it is on; "" if that is this one, or not known

    @classmethod
    def of(cls, source: BlockDevice, generation: str) -> Self:
        return cls(source.path, source.permanent_name, source.size, generation)

    def is_of(self, source: BlockDevice) -> bool:
        """Whether it is this device: by its permanent name, by its path where it has none."""
        name = source.permanent_name
        if self.name and name:
            return self.name == name
        return os.path.realpath(self.device) == os.path.realpath(source.path)

    def is_as(self, other: Origin) -> bool:
        """Whether both are one device of one other host, which cannot be asked."""
        if not self.host or self.host != other.host:
            return False
        if self.name and other.name:
            return self.name == other.name
        return self.device == other.device


@dataclass(frozen=True)
class Seal:
    """What betrays that a replica is another one, or was written by others.

    The kernel's counters tell of any write to a device within one boot; a file has its inode and
    modification time. Over a boot of a device only the digest of its edges is left.
    """

    size: int
    digest: str  # of the first and last bytes; "" while a copy is under way
    identity: str  # a device: its diskseq; a file: its inode
    changes: str  # a device: sectors written and discarded; a file: its modification time
    boot: str  # where identity and changes mean something; "" if at any time

    @classmethod
    def of_device(cls, device: BlockDevice, digest: str) -> Self:
        counts = (device.sys / "stat").read_text().split()
        changes = f"{counts[6]}+{counts[13] if len(counts) > 13 else 0}"
        return cls(device.size, digest, str(device.diskseq), changes, boot_id())

    @classmethod
    def of_file(cls, info: os.stat_result, digest: str) -> Self:
        return cls(info.st_size, digest, str(info.st_ino), str(info.st_mtime_ns), "")

    def is_other(self, now: Seal) -> bool:
        """Whether `now` is of another device or file, as far as can be told."""
        return self.boot == now.boot and self.identity != now.identity

    def changed(self, now: Seal) -> str:
        """What happened to the replica since this was taken: a clause, "" if nothing is seen."""
        if self.is_other(now):
            return "it was replaced, or its device was connected anew"
        if self.size != now.size:
            return f"its size went from {self.size} to {now.size} bytes"
        if not self.digest:
            return ""
        if self.boot == now.boot and self.changes != now.changes:
            return "it was written to by something else"
        if self.digest != now.digest:
            return "its first or last bytes were changed by something else"
        return ""


def host_id() -> str:
    """By which a host is known to others; "" if it has nothing to be known by. machine-id(5) asks
    that its own text is not given away."""
    with contextlib.suppress(OSError):
        text = Path("/etc/machine-id").read_bytes().strip()
        if len(text) == 32:
            return hashlib.blake2b(text, digest_size=16, key=b"blktrack").hexdigest()
    return ""


def edges(end: Endpoint) -> str:
    """A digest of the first and last bytes of an end."""
    sum_ = hashlib.blake2b(digest_size=20)
    sum_.update(end.read(0, min(_EDGE, end.size)))
    if end.size > _EDGE:
        start = max(_EDGE, end.size - _EDGE)
        sum_.update(end.read(start, end.size - start))
    return sum_.hexdigest()


@dataclass(frozen=True)
class Record:
    """replica.json: the replica as blktrack knows it."""

    link: str  # uuid
    source: Origin
    state: State
    point: Point | None  # while APPLYING the one that is being left
    seal: Seal
    # The point of a staged increment while APPLYING it, and as `inspect` tells of a READY replica,
    # while it waits.
    next: Point | None = None

    def changed(self, now: Seal) -> str:
        """What happened to the replica since this was written: a clause, "" if nothing is seen."""
        seal = self.seal
        if self.state is not State.READY and now.size == self.source.size:
            seal = replace(seal, size=now.size)  # a file is given its source's size after `begin`
        return seal.changed(now)

    def write(self, path: Path) -> None:
        write_json(path, {"format": FORMAT, **plain(self)})

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where there is none. Keys that are not known are ignored."""
        value = read_json(path)
        if value is None:
            return None
        try:
            if value["format"] > FORMAT:
                raise BlktrackError(
                    f"{path} was written by a newer blktrack", hint="upgrade blktrack on this host"
                )
            point, following = value["point"], value.get("next")
            return cls(
                link=str(value["link"]),
                source=_known(Origin, value["source"]),
                state=State(value["state"]),
                point=_known(Point, point) if point is not None else None,
                seal=_known(Seal, value["seal"]),
                next=_known(Point, following) if following is not None else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BlktrackError(
                f"{path} is damaged: {error!r}",
                hint=f"move {path} away; the next sync then needs --force and starts over",
            ) from error


def _known(kind: type[_T], value: dict[str, Any]) -> _T:
    """What has a default may be missing: an older version did not write it."""
    return kind(**{one.name: value[one.name] for one in fields(kind) if one.name in value})
