"""The replica store: a target, whose it is, and the state kept beside it.

    FILE                                    a replica file, locked while in use
    FILE.blktrack/replica.json              its record
    /dev/...                                a replica device, claimed (O_EXCL) while in use
    <lib>/replicas/ID/replica.json          its record; ID follows the device, not its name
    <run>/replicas/ID.lock                  held while in use
    incoming.pack, .index, .json, .part     beside the record: a staged increment, see `stage`

An increment is staged beside the replica and sealed, which commits it, then applied: see `apply`.
A crash before the seal leaves the old point, and what `partial` goes on with if the stage was made
to be kept; one after it leaves what `open` finishes before anything else. So whoever opened a
replica to write it has it at one point, the old or the new, unless `changed` says why not.

Copies in place have no point to protect, as initial ones and resyncs, or are asked to give it up,
as an increment for which there is no room beside the replica. `begin` records that the bytes
are about to leave their point before the first of them does, and `commit` makes all bytes durable
before it records the new point. So after a crash the record either names the point that the bytes
are at, or says that they are at none (UNFINISHED) or between two (APPLYING). A file that was
created and never begun is removed; one that a crash leaves is empty, and as good as absent.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from blktrack import linux
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Refused
from blktrack.observer import NOBODY, Observer
from blktrack.point import Point
from blktrack.ship.apply import apply, settle
from blktrack.ship.claim import take
from blktrack.ship.endpoint import Endpoint, FileEnd
from blktrack.ship.header import StageDamaged
from blktrack.ship.place import Place, folder_of, lock_of
from blktrack.ship.record import Origin, Record, Seal, State
from blktrack.ship.stage import Stage, discard
from blktrack.ship.target import Signature, Target, check, check_idle, check_room, signature
from blktrack.sysfs import BlockDevice


class Replica:
    """An open target that may be written for this source. Made by `open`; a context manager."""

    link: str
    changed: str  # why the bytes may not be what the record says; "" if they are
    blank: bool  # all of it is known to read as zeroes
    finished: Point | None  # to which `open` brought it, from what an earlier run had sealed

    def __init__(self, place: Place, source: BlockDevice | Origin) -> None:
        self.changed = ""
        self.blank = False
        self.finished = None
        self._place = place
        self._source = source
        self._created = False  # by this run, and not begun yet
        self._stop: threading.Event | None = None
        self._observer: Observer = NOBODY
        self._held = contextlib.ExitStack()

    @classmethod
    def open(
        cls,
        name: str,
        *,
        source: BlockDevice | Origin,
        link: str | None,
        paths: Paths,
        force: bool = False,
        near: BlockDevice | None = None,
        writable: bool = True,
        stop: threading.Event | None = None,
        observer: Observer = NOBODY,
    ) -> Self:
        """Take the target for a replica of `source`, or refuse it.

        source -- an Origin where the source is not on this host: it is then known by its link.
        near -- the source, where it is on this host all the same, though it is not asked.
        link -- the uuid that this source and target are linked by, None if none is known: then one
            found on the replica of this source goes on, as `changed`, or a new one is made.
        force -- take what holds other data, or belongs to another source or link.
        writable -- False: only to be read; nothing is created or claimed, and anything is read.
        stop -- set it to end early the finishing of what an earlier run left: ApplyStopped.
        observer -- is told of that finishing.

        Raises Refused, Busy if another run has it, UsageError for a target that cannot be reached.
        """
        target = Target.find(name)
        if isinstance(source, BlockDevice):
            near = source
        if near is not None:
            check(target, near, writable=writable)
        else:
            check_room(target, source.size)
            check_idle(target)
        folder = folder_of(target, paths)
        with contextlib.ExitStack() as held:
            lock = lock_of(folder, paths)
            end, created = take(target, lock, held, size=source.size, writable=writable)
            replica = cls(Place(target, end, folder), source)
            replica._created, replica._stop, replica._observer = created, stop, observer
            held.callback(replica._forget)
            replica._judge(link, force=force, writable=writable)
            replica._held = held.pop_all()
        return replica

    @property
    def target(self) -> Target:
        return self._place.target

    @property
    def end(self) -> Endpoint:
        """Where the bytes go."""
        return self._place.end

    @property
    def record(self) -> Record | None:
        """As found, then as last written; None: nothing of ours is there."""
        return self._place.record

    @property
    def existing_state(self) -> State | None:
        return self.record.state if self.record else None

    @property
    def has_point(self) -> bool:
        """Whether its bytes are those of a point, to be kept until there is another."""
        record = self.record
        if record is None or record.state is not State.READY or record.point is None:
            return False
        return not self.changed

    @property
    def folder(self) -> Path:
        """Where its record is kept, and where increments are staged."""
        return self._place.folder

    @property
    def writes(self) -> list[Path]:
        """What is written to on the way to a point."""
        return [self.folder, Path(self.target.path)]

    def source_has(self, size: int) -> None:
        """The source, which is not on this host, has so many bytes by now."""
        if isinstance(self._source, Origin):
            self._source = replace(self._source, size=size)

    def check_room(self) -> None:
        """Refused if it cannot hold the source as that is by now."""
        check_room(self.target, self._source.size)

    def stage(self, *, keep: bool = False, most: int | None = None) -> Stage:
        """Begin an increment beside the replica, which stays at its point. An older one is dropped.

        keep -- for `partial` to find if it is not sealed. most -- bytes that it may take beside the
        replica: TooMuchStaged.

        ValueError if the replica is at no point: it is then copied or compared in place.
        """
        record = self.record
        if record is None or record.state is not State.READY or record.point is None:
            raise ValueError("an increment has no point to start from")
        if self.changed:
            raise ValueError(f"an increment for a replica that {self.changed}")
        size = self._source.size
        return Stage.create(
            self.folder, size, link=self.link, base=record.point, keep=keep, most=most
        )

    def partial(self, *, most: int | None = None) -> Stage | None:
        """The increment that was begun to be kept, to go on with it: None if there is none from the
        point of the replica, or the source has another size by now. Only one may be open."""
        record = self.record
        if record is None or record.point is None or not self.has_point:
            return None
        size = self._source.size
        return Stage.resume(self.folder, link=self.link, base=record.point, size=size, most=most)

    def apply(
        self,
        stage: Stage,
        progress: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Bring the replica to the point of a sealed stage, and drop the stage.

        Refused if others wrote to the replica since it was at its point, as `changed` says then,
        and the stage is dropped. After any other error, ApplyStopped if `stop` was set, or a death,
        the next `open` goes on, but after StageDamaged only a resync helps.
        """
        record = self.record
        if record is None or stage.point is None or not stage.leads_from(record):
            raise ValueError("a stage that is not sealed, or not for this replica")
        if changed := self._place.changed(record):
            self.changed = changed
            stage.drop()
            raise Refused(
                f"{self.target.name} is not as it was left: {changed}",
                hint="run blktrack sync: it compares the replica with its source and repairs it",
            )
        try:
            source = self._origin(stage.point.generation)
            apply(self._place, stage, source, progress=progress, stop=stop)
        except StageDamaged as error:
            self.changed = str(error)
            raise

    def begin(self, state: State, generation: str) -> None:
        """Record, before the first write, that the replica leaves its point: call it once a run.

        UNFINISHED gives the point up, for an initial copy or a resync. APPLYING keeps it on record,
        for an increment in place: whoever has all that changed since that point may go on with it.
        ValueError if there is none.
        """
        point = self.record.point if self.record and state is State.APPLYING else None
        if state is State.READY or (state is State.APPLYING and point is None):
            raise ValueError(f"a replica without a point cannot be {state}")
        self._place.leave(self.link, self._origin(generation), state, point)
        discard(self._place.folder)  # whatever is staged starts from a point that is left

    def commit(self, point: Point) -> None:
        """Make the bytes durable, then record that they are at `point`."""
        if self.record is None:
            raise ValueError("commit without begin")
        self._place.arrive(self.link, self._origin(point.generation), point)
        self.changed = ""

    def _origin(self, generation: str) -> Origin:
        if isinstance(self._source, Origin):
            return replace(self._source, generation=generation)
        return Origin.of(self._source, generation)

    def close(self) -> None:
        with contextlib.suppress(BlktrackError, OSError):  # of a target that is gone, say
            self._place.pause()
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

    def _forget(self) -> None:
        """Remove the file that this run made and never began to fill."""
        if self._created and not self._place.written:
            with contextlib.suppress(OSError):
                os.unlink(self.target.path)

    def _judge(self, link: str | None, *, force: bool, writable: bool) -> None:
        """Whose it is, and whether it is as it was left. Refused if it is not ours to write."""
        record = self._place.read()
        if record is not None:
            now = self._place.seal(digest=bool(record.seal.digest))
            if self._created or self._is_gone(record.seal, now):
                record = None  # a new file may well have the inode of the one that was removed
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
                if writable:
                    record = self._settle(record)
                if link is None and not self.changed:
                    self.changed = "its link was not known here"
        self.link = record.link if record else link or str(uuid.uuid4())
        self._place.record = record
        self.blank = self._created or (isinstance(self.end, FileEnd) and not _has_data(self.end))
        if record is None and writable and not force:
            self._refuse_content()

    def _settle(self, record: Record) -> Record:
        """Finish or drop what an earlier run staged; the record then."""
        self._place.record = record
        self.finished, self.changed = settle(self._place, self.changed, self._stop, self._observer)
        return self._place.record

    def _is_gone(self, seal: Seal, now: Seal) -> bool:
        """Whether another file stands where the replica was. A copy of the replica counts as it."""
        return (
            isinstance(self.end, FileEnd)
            and seal.is_other(now)
            and (not seal.digest or (seal.size, seal.digest) != (now.size, now.digest))
        )

    def _belongs(self, record: Record, link: str | None) -> str:
        source, own = record.source, self._source
        if isinstance(own, BlockDevice):
            known = source.is_of(own)
        else:
            known = link is not None or source.is_as(own)
        if not known:
            host = "" if isinstance(own, BlockDevice) else " of another host"
            return f"is a replica of {source.device} ({source.name or 'no name'}){host}"
        if link is not None and record.link != link:
            return f"belongs to another link of {record.source.device} ({record.link})"
        return ""

    @property
    def _named(self) -> str:
        source = self._source
        return source.device if isinstance(source, Origin) else source.path

    def _refuse_stranger(self) -> None:
        """Refuse what was put in the replica's place: bytes that the source would not explain."""
        found = signature(self.target.path)
        if found == Signature():
            return
        if isinstance(self._source, BlockDevice) and found == signature(self._source.path):
            return
        raise Refused(
            f"{self.target.name} was a replica, but now carries {found} that its source"
            f" {self._named} may not",
            hint="choose another replica, or --force to overwrite it",
        )

    def _refuse_content(self) -> None:
        name = self.target.name
        if self.target.device is not None:
            if (found := signature(self.target.path)) != Signature():
                raise Refused(
                    f"{name} carries {found}, and is not a replica of {self._named}",
                    hint=f"wipefs -a {name} if it may go, or --force; or choose another replica",
                )
        elif not self.blank:
            raise Refused(
                f"{name} is a file with data in it, and not a replica of {self._named}",
                hint="choose another name, or --force to overwrite it",
            )


def _has_data(end: FileEnd) -> bool:
    return next(linux.data_extents(end.fileno()), None) is not None
