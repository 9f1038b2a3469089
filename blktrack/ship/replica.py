"""The replica store: a target, whose it is, and the state kept beside it.

    FILE                                    a replica file, locked while in use
    FILE.blktrack/replica.json              its record
    /dev/...                                a replica device, claimed (O_EXCL) while in use
    <lib>/replicas/ID/replica.json          its record; ID follows the device, not its name
    <run>/replicas/ID.lock                  held while in use

`begin` records that the bytes are about to leave their point before the first of them does, and
`commit` makes all bytes durable before it records the new point. So after a crash the record either
names the point that the bytes are at, or says that they are at none (UNFINISHED) or between two
(APPLYING). A file that was created and never begun is removed; one that a crash leaves is empty,
and as good as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from blktrack import crash, linux
from blktrack.config import Paths
from blktrack.durable import lock
from blktrack.errors import Refused
from blktrack.point import Point
from blktrack.ship.claim import open_device, open_file
from blktrack.ship.endpoint import Endpoint, FileEnd
from blktrack.ship.record import Origin, Record, Seal, State, edges
from blktrack.ship.target import Signature, Target, check, signature
from blktrack.sysfs import BlockDevice, boot_id

RECORD = "replica.json"


class Replica:
    """An open target that may be written for this source. Made by `open`; a context manager."""

    target: Target
    end: Endpoint  # where the bytes go
    link: str
    record: Record | None  # as found, then as last written; None: nothing of ours is there
    changed: str  # why the bytes may not be what the record says; "" if they are
    blank: bool  # all of it is known to read as zeroes

    def __init__(self, target: Target, end: Endpoint, source: BlockDevice, folder: Path) -> None:
        self.target = target
        self.end = end
        self.changed = ""
        self.blank = False
        self.record = None
        self._source = source
        self._folder = folder
        self._created = False  # by this run, and not begun yet
        self._held = contextlib.ExitStack()

    @classmethod
    def open(
        cls,
        name: str,
        *,
        source: BlockDevice,
        link: str | None,
        paths: Paths,
        force: bool = False,
        writable: bool = True,
    ) -> Self:
        """Take the target for a replica of `source`, or refuse it.

        link -- the uuid that this source and target are linked by, None if none is known: then one
            found on the replica of this source goes on, as `changed`, or a new one is made.
        force -- take what holds other data, or belongs to another source or link.
        writable -- False: only to be read; nothing is created or claimed, and anything is read.

        Raises Refused, Busy if another run has it, UsageError for a target that cannot be reached.
        """
        target = Target.find(name)
        check(target, source, writable=writable)
        folder = _folder(target, paths)
        with contextlib.ExitStack() as held:
            if target.device is not None:
                path = paths.run / "replicas" / f"{folder.name}.lock"
                held.enter_context(lock(path, what=f"replica {name}"))
                end: Endpoint = open_device(target, writable=writable)
                created = False
            else:
                end, created = open_file(target, source, writable=writable)
            held.callback(end.close)
            replica = cls(target, end, source, folder)
            replica._created = created
            held.callback(replica._forget)
            replica._judge(link, force=force, writable=writable)
            replica._held = held.pop_all()
        return replica

    @property
    def existing_state(self) -> State | None:
        return self.record.state if self.record else None

    def begin(self, state: State, generation: str) -> None:
        """Record, before the first write, that the replica leaves its point: call it once a run.

        UNFINISHED gives the point up, for an initial copy or a resync. APPLYING keeps it on record,
        for an increment; ValueError if there is none.
        """
        point = self.record.point if self.record and state is State.APPLYING else None
        if state is State.READY or (state is State.APPLYING and point is None):
            raise ValueError(f"a replica without a point cannot be {state}")
        origin = Origin.of(self._source, generation)
        self._write(Record(self.link, origin, state, point, self._seal(digest=False)))
        self._created = False
        crash.point("apply-recorded")
        if isinstance(self.end, FileEnd) and self.end.size != self._source.size:
            self.end.resize(self._source.size)
            crash.point("apply-resized")

    def commit(self, point: Point) -> None:
        """Make the bytes durable, then record that they are at `point`."""
        if self.record is None:
            raise ValueError("commit without begin")
        self.end.flush()
        crash.point("commit-flushed")
        origin = Origin.of(self._source, point.generation)
        self._write(Record(self.link, origin, State.READY, point, self._seal(digest=True)))
        self.changed = ""

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, record: Record) -> None:
        record.write(self._folder / RECORD)
        self.record = record

    def _forget(self) -> None:
        """Remove the file that this run made and never began to fill."""
        if self._created:
            with contextlib.suppress(OSError):
                os.unlink(self.target.path)

    def _seal(self, *, digest: bool) -> Seal:
        sum_ = edges(self.end) if digest else ""
        if isinstance(self.end, FileEnd):
            return Seal.of_file(os.fstat(self.end.fileno()), sum_)
        assert self.target.device is not None
        return Seal.of_device(self.target.device, sum_)

    def _judge(self, link: str | None, *, force: bool, writable: bool) -> None:
        """Whose it is, and whether it is as it was left. Refused if it is not ours to write."""
        record = Record.read(self._folder / RECORD)
        if record is not None:
            now = self._seal(digest=bool(record.seal.digest))
            if self._is_gone(record.seal, now):
                record = None
            elif reason := self._belongs(record, link):
                if writable and not force:
                    raise Refused(
                        f"{self.target.name} {reason}",
                        hint="choose another replica; --force gives it to this source",
                    )
                record = None if writable else record
            else:
                self.changed = record.changed(now)
                if record.seal.digest not in ("", now.digest) and writable and not force:
                    self._refuse_stranger()
                if link is None and not self.changed:
                    self.changed = "its link was not known here"
        self.link = record.link if record else link or str(uuid.uuid4())
        self.record = record
        self.blank = self._created or (isinstance(self.end, FileEnd) and not _has_data(self.end))
        if record is None and writable and not force:
            self._refuse_content()

    def _is_gone(self, seal: Seal, now: Seal) -> bool:
        """Whether another file stands where the replica was. A copy of the replica counts as it."""
        return (
            isinstance(self.end, FileEnd)
            and seal.is_other(now)
            and (not seal.digest or (seal.size, seal.digest) != (now.size, now.digest))
        )

    def _belongs(self, record: Record, link: str | None) -> str:
        if not record.source.is_of(self._source):
            return f"is a replica of {record.source.device} ({record.source.name or 'no name'})"
        if link is not None and record.link != link:
            return f"belongs to another link of {record.source.device} ({record.link})"
        return ""

    def _refuse_stranger(self) -> None:
        """Refuse what was put in the replica's place: bytes that the source would not explain."""
        found = signature(self.target.path)
        if found != Signature() and found != signature(self._source.path):
            raise Refused(
                f"{self.target.name} was a replica, but now carries {found} that the source"
                f" {self._source.path} does not",
                hint="choose another replica, or --force to overwrite it",
            )

    def _refuse_content(self) -> None:
        name = self.target.name
        if self.target.device is not None:
            if (found := signature(self.target.path)) != Signature():
                raise Refused(
                    f"{name} carries {found}, and is not a replica of {self._source.path}",
                    hint=f"wipefs -a {name} if it may go, or --force; or choose another replica",
                )
        elif not self.blank:
            raise Refused(
                f"{name} is a file with data in it, and not a replica of {self._source.path}",
                hint="choose another name, or --force to overwrite it",
            )


def inspect(name: str, paths: Paths) -> tuple[Record | None, str]:
    """The record of a target, None if it has none, and what seems to have happened to it since.

    Opens and locks nothing, and so sees no more than sizes, times and counters.
    """
    target = Target.find(name)
    record = Record.read(_folder(target, paths) / RECORD)
    if record is None:
        return None, "" if target.exists else "it is gone"
    if not target.exists:
        return record, "it is gone"
    if target.device is not None:
        return record, record.changed(Seal.of_device(target.device, record.seal.digest))
    return record, record.changed(Seal.of_file(os.stat(target.path), record.seal.digest))


def _folder(target: Target, paths: Paths) -> Path:
    device = target.device
    if device is None:
        return Path(f"{target.path}.blktrack")
    name = device.permanent_name or f"{device.name}:{device.diskseq}:{boot_id()}"
    words = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:40]
    return paths.lib / "replicas" / f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _has_data(end: FileEnd) -> bool:
    return next(linux.data_extents(end.fileno()), None) is not None
