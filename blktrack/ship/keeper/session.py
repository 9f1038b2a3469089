"""The requests of one connection, held against what came before them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from blktrack import crash, extent
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Refused
from blktrack.quiesce.find import devices_below
from blktrack.ship.apply import finish
from blktrack.ship.endpoint import DeviceEnd, EndError, open_end
from blktrack.ship.fields import Fields, sayable
from blktrack.ship.jail import Jail
from blktrack.ship.keeper.data import Data
from blktrack.ship.keeper.wrong import wrong
from blktrack.ship.pack import TooMuchStaged, resolve
from blktrack.ship.record import Origin, State
from blktrack.ship.replica import Replica
from blktrack.ship.room import FULL, NoRoom, free_in
from blktrack.ship.stage import Stage
from blktrack.ship.wire import digests
from blktrack.ship.wire.channel import Channel
from blktrack.ship.wire.message import (
    Kind,
    Message,
    pack,
    pack_json,
)
from blktrack.sysfs import BlockDevice, boot_id

_TELL_EVERY = 0.2  # seconds between two words of progress


class Session:
    """What one connection has open. A context manager."""

    def __init__(self, channel: Channel, paths: Paths, jail: Jail | None) -> None:
        self._channel = channel
        self._paths = paths
        self._jail = jail
        self._held = contextlib.ExitStack()
        self._request = 0
        self._told = 0.0
        self._replica: Replica | None = None
        self._stage: Stage | None = None  # of an earlier connection, until it is asked for
        self._data = Data()
        self._held.callback(self._data.close)

    def handle(self, message: Message) -> None:
        """Do what one message asks for, and answer if it has an answer."""
        self._request = message.request
        match message.kind:
            case Kind.WRITE:
                with self._room_kept():
                    self._data.write(message)
            case Kind.ZERO:
                with self._room_kept():
                    self._data.zero(message)
            case Kind.COMPARE:
                found = self._data.compare(message)
                self._channel.send(pack(Kind.DIGESTS, message.request, data=[found]))
            case kind if kind in _REQUESTS:
                fields = Fields.parse(message.json() or b"{}", kind.name, wrong)
                self._answer(_REQUESTS[kind](self, fields) or {})
            case kind:
                raise wrong(f"it sends {kind.name}")

    def _answer(self, value: dict[str, Any]) -> None:
        self._channel.send(pack_json(Kind.DONE, self._request, value))

    def _open(self, fields: Fields) -> dict[str, Any]:
        if self._replica is not None or self._data.reads is not None:
            raise wrong("it opens a second target")
        self._data.key = _hex(fields, "key", digests.KEY_SIZE)
        source = fields.inner("source")
        origin = Origin(
            device=source.text("device"),
            name=source.text("name"),
            size=source.number("size", 1),
            generation="",
            host=source.text("host"),
        )
        force = fields.flag("force")
        target = self._admit(fields.text("target"), origin.size, force)
        if not fields.flag("writable"):
            finish(target, self._paths, observer=self)
            self._data.reads = end = self._held.enter_context(open_end(target))
            return {"size": end.size, **_here()}
        near = _near(fields)
        replica = self._replica = self._held.enter_context(
            Replica.open(
                target,
                source=origin,
                link=fields.uuid("link") if fields.has("link") else None,
                paths=self._paths,
                near=near,
                force=force,
                observer=self,
            )
        )
        self._data.reads = replica.end
        self._data.unit = replica.end.align if isinstance(replica.end, DeviceEnd) else 1
        if partial := replica.partial(most=self._most_staging):
            self._stage = self._held.enter_context(partial)
        return {
            "link": replica.link,
            "record": asdict(replica.record) if replica.record else None,
            "changed": sayable(replica.changed),
            "blank": replica.blank,
            "size": replica.end.size,
            "align": self._data.unit,
            "stages": near is None or near.number not in devices_below(replica.folder),
            "stage": self._stage.id if self._stage else "",
            "mark": self._stage.mark if self._stage else 0,
            "writes": [str(path) for path in replica.writes],
            **_here(),
        }

    def _admit(self, target: str, size: int, force: bool) -> str:
        if self._jail is not None:
            path = self._jail.admit(target)
            self._jail.check_force(asked=force)
            self._jail.check_size(path, size)
            return path
        if not target.startswith("/"):
            raise Refused(f"{target} is not a full path", hint="write it as ssh://HOST/PATH")
        return target

    def _room(self, fields: Fields) -> None:
        replica = self._opened(fields)
        replica.check_room()

    def _begin(self, fields: Fields) -> dict[str, Any]:
        replica = self._opened(fields)
        state = fields.text("state")
        known = [State.UNFINISHED]
        if replica.record is not None and replica.record.point is not None:
            known.append(State.APPLYING)
        if state not in known:
            raise wrong(f"it begins with {state!r}")
        self._drop_stage()
        replica.begin(State(state), fields.text("generation"))
        self._data.writes = replica.end
        return {"size": replica.end.size}

    def _begin_stage(self, fields: Fields) -> dict[str, Any]:
        replica = self._opened(fields)
        if not replica.has_point:
            raise wrong("it stages for a replica that is at no point")
        stage = self._stage
        if (
            stage is None
            or stage.id != fields.text("resume")
            or stage.size != fields.number("size")  # it has grown since
        ):
            self._drop_stage()
            stage = replica.stage(keep=True, most=self._most_staging)
            self._stage = self._held.enter_context(stage)
        self._data.writes = stage.end
        folder = sayable(str(replica.folder))
        return {"id": stage.id, "folder": folder, "free": self._free(replica)}

    def _free(self, replica: Replica) -> int | None:
        """Bytes that can still be staged."""
        free, most = free_in(replica.folder), self._most_staging
        return most if free is None else free if most is None else min(free, most)

    @property
    def _most_staging(self) -> int | None:
        return self._jail.most_staging if self._jail else None

    def _drop_stage(self) -> None:
        self._data.writes = None
        if self._stage is not None:
            self._stage.drop()
            self._stage = None

    @contextlib.contextmanager
    def _room_kept(self) -> Iterator[None]:
        """A stage that has filled its file system goes, so that others there can go on."""
        stage, replica = self._stage, self._replica
        try:
            yield
        except EndError as error:
            if stage is None or replica is None or error.errno not in FULL:
                raise
            staged = int(stage.end.index()[:, 1].sum())
            stage.drop()
            raise NoRoom.after(replica.folder, staged, error) from error
        except TooMuchStaged:
            if stage is not None:
                stage.drop()
            raise

    def _flush(self, fields: Fields) -> dict[str, Any]:
        if self._data.writes is None:
            raise wrong("it flushes before it has begun")
        if self._stage is None:
            self._data.writes.flush()
        else:
            with self._room_kept():
                self._stage.checkpoint()
        crash.point("serve-flushed")
        return {"mark": self._stage.mark if self._stage else 0}

    def _seal(self, fields: Fields) -> None:
        stage = self._stage
        if stage is None or self._data.writes is not stage.end:
            raise wrong("it seals no stage")
        index = resolve(stage.end.index())
        extents = extent.union(extent.empty(), index[:, :2])
        if digests.of_extents(extents) != fields.text("extents"):
            # Its journal was damaged here perhaps: the next connection begins anew.
            self._drop_stage()
            raise wrong("what it seals is not what was staged")
        with self._room_kept():
            stage.seal(extents, fields.point("point"))
        self._data.writes = None

    def _apply(self, fields: Fields) -> None:
        if self._replica is None or self._stage is None or self._stage.point is None:
            raise wrong("it applies no sealed stage")
        self._replica.apply(self._stage, self.done)
        self._stage = None

    def _commit(self, fields: Fields) -> None:
        replica = self._opened(fields)
        if self._data.writes is None:
            if not replica.has_point:
                raise wrong("it commits what has not begun")
            self._drop_stage()  # it starts from a point that is left
        elif self._stage is not None:
            raise wrong("it commits what is staged")
        replica.commit(fields.point("point"))
        self._data.writes = None

    def _opened(self, fields: Fields) -> Replica:
        """The replica, told how large its source is by now."""
        if self._replica is None:
            raise wrong("it has opened no replica")
        if self._stage is not None and self._stage.point is not None:
            raise wrong("it goes on without what it has sealed")  # which is as good as applied
        size = fields.number("size", 1)
        if self._jail is not None:
            self._jail.check_size(self._replica.target.path, size)
        self._replica.source_has(size)
        return self._replica

    # What is told of a request that takes long. The source may be gone: then nobody is told.

    def phase(self, name: str, total: int) -> None:
        self._tell({"phase": sayable(name), "total": total})

    def done(self, count: int) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY:
            self._told = now
            self._tell({"done": count})

    def warn(self, message: str) -> None:
        self._tell({"warn": sayable(message)})

    def _tell(self, value: dict[str, Any]) -> None:
        with contextlib.suppress(BlktrackError):
            self._channel.send(pack_json(Kind.PROGRESS, self._request, value))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


_REQUESTS: dict[Kind, Callable[[Session, Fields], dict[str, Any] | None]] = {
    Kind.OPEN: Session._open,
    Kind.ROOM: Session._room,
    Kind.BEGIN: Session._begin,
    Kind.STAGE: Session._begin_stage,
    Kind.FLUSH: Session._flush,
    Kind.SEAL: Session._seal,
    Kind.APPLY: Session._apply,
    Kind.COMMIT: Session._commit,
}


def _here() -> dict[str, Any]:
    return {"boot": boot_id()}


def _near(fields: Fields) -> BlockDevice | None:
    """The source, where it is a device of this very host."""
    if fields.text("boot") != boot_id() or not boot_id():
        return None
    major, minor = fields.number("major", high=1 << 12), fields.number("minor", high=1 << 20)
    return BlockDevice.of_number(major, minor)


def _hex(fields: Fields, key: str, size: int) -> bytes:
    try:
        value = bytes.fromhex(fields.text(key))
    except ValueError:
        value = b""
    if len(value) != size:
        fields.refuse(key)
    return value
