"""The keeper: serves one source on another host, over one connection, with one replica.

It trusts nothing of what it is told: see `message` for the form, here for the sense. It never
sends what a replica holds, only digests of it. Whatever ends the connection, the replica is at a
point or on its way to one, as with a sync on this host that died; what of an increment is durable
here stays, for the next connection to go on with.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from blktrack import crash, extent
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Refused
from blktrack.extent import Extent, ExtentArray
from blktrack.linux import PAGE, Buffer
from blktrack.ship.aio import RequestQueue
from blktrack.ship.apply import finish
from blktrack.ship.delta.pipe import Sink, Source
from blktrack.ship.endpoint import DeviceEnd, EndError, Endpoint, open_end
from blktrack.ship.fields import Fields
from blktrack.ship.jail import Jail
from blktrack.ship.pack import resolve
from blktrack.ship.plan import MAX_REQUESTS, Piece
from blktrack.ship.record import Origin, State
from blktrack.ship.replica import Replica
from blktrack.ship.stage import Stage
from blktrack.ship.wire import digests, hello
from blktrack.ship.wire.channel import Channel
from blktrack.ship.wire.errors import ConnectionLost, ProtocolError
from blktrack.ship.wire.inbox import Inbox
from blktrack.ship.wire.message import (
    MAX_DATA,
    MAX_ROWS,
    Kind,
    Message,
    pack,
    pack_json,
)
from blktrack.sysfs import BlockDevice, boot_id

_SOURCE = "the source"
_LINGER = 5.0  # seconds for the source to take note of an error
_TELL_EVERY = 0.2  # seconds between two words of progress
_FULL = (errno.ENOSPC, errno.EDQUOT)


def serve(source: Source, sink: Sink, paths: Paths, jail: Jail | None) -> None:
    """Serve one source until it ends the connection.

    jail -- which targets it may have; None: any.

    Raises BlktrackError, of which the source has been told if that was possible.
    """
    channel = Channel(source, sink, peer=_SOURCE, patience=hello.PATIENCE)
    channel.write(hello.announce())
    channel.patience = hello.accept(channel.fill)
    channel.beat(Kind.ALIVE)
    inbox = Inbox(channel)
    request = 0
    try:
        with Session(channel, paths, jail) as session:
            while message := inbox.take():
                request = message.request
                session.handle(message)
    except BlktrackError as error:
        with contextlib.suppress(ConnectionLost):
            channel.send(pack_json(Kind.FAILED, request, _told(error)))
        inbox.drop(_LINGER)
        raise
    finally:
        channel.close()


def _told(error: BlktrackError) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {
        "message": str(error),
        "hint": error.hint,
        "exit": error.exit_code,
        "kinds": kinds[: kinds.index(BlktrackError.__name__) + 1],
    }


class Session:
    """What one connection has open. A context manager."""

    def __init__(self, channel: Channel, paths: Paths, jail: Jail | None) -> None:
        self._channel = channel
        self._paths = paths
        self._jail = jail
        self._held = contextlib.ExitStack()
        self._request = 0
        self._told = 0.0
        self._key = b""
        self._replica: Replica | None = None
        self._partial: Stage | None = None  # of an earlier connection
        self._stage: Stage | None = None
        self._reads: Endpoint | None = None  # what is compared
        self._writes: Endpoint | None = None  # where what comes goes
        self._unit = 1  # of what is written
        self._buffer = Buffer(MAX_DATA + 2 * MAX_ROWS * PAGE)
        self._requests: RequestQueue | None = None
        with contextlib.suppress(OSError):
            self._requests = RequestQueue(MAX_REQUESTS)

    def handle(self, message: Message) -> None:
        """Do what one message asks for, and answer if it has an answer."""
        self._request = message.request
        match message.kind:
            case Kind.WRITE:
                self._write(message)
            case Kind.ZERO:
                self._zero(message)
            case Kind.COMPARE:
                self._compare(message)
            case kind if kind in _REQUESTS:
                fields = Fields.parse(message.json() or b"{}", kind.name, _wrong)
                self._answer(_REQUESTS[kind](self, fields) or {})
            case kind:
                raise _wrong(f"it sends {kind.name}")

    def _answer(self, value: dict[str, Any]) -> None:
        self._channel.send(pack_json(Kind.DONE, self._request, value))

    def _open(self, fields: Fields) -> dict[str, Any]:
        if self._replica is not None or self._reads is not None:
            raise _wrong("it opens a second target")
        self._key = _hex(fields, "key", digests.KEY_SIZE)
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
            self._reads = end = self._held.enter_context(open_end(target))
            return {"size": end.size, "align": end.align, **_here()}
        replica = self._replica = self._held.enter_context(
            Replica.open(
                target,
                source=origin,
                link=fields.uuid("link") if fields.has("link") else None,
                paths=self._paths,
                near=_near(fields),
                force=force,
                observer=self,
            )
        )
        self._reads = replica.end
        self._unit = replica.end.align if isinstance(replica.end, DeviceEnd) else 1
        if partial := replica.partial():
            self._partial = self._held.enter_context(partial)
        return {
            "link": replica.link,
            "record": asdict(replica.record) if replica.record else None,
            "changed": replica.changed,
            "blank": replica.blank,
            "size": replica.end.size,
            "align": self._unit,
            "stage": self._partial.id if self._partial else "",
            "writes": [str(path) for path in replica.writes],
            "finished": asdict(replica.finished) if replica.finished else None,
            **_here(),
        }

    def _admit(self, target: str, size: int, force: bool) -> str:
        if self._jail is not None:
            return self._jail.admit(target, size=size, force=force)
        if not target.startswith("/"):
            raise Refused(f"{target} is not a full path", hint="write it as ssh://HOST/PATH")
        return target

    def _room(self, fields: Fields) -> None:
        replica = self._opened(fields)
        replica.check_room()

    def _begin(self, fields: Fields) -> dict[str, Any]:
        replica = self._opened(fields)
        state = fields.text("state")
        if state not in (State.UNFINISHED, State.APPLYING) or self._stage is not None:
            raise _wrong(f"it begins with {state}")
        self._leave_partial()
        replica.begin(State(state), fields.text("generation"))
        self._writes = replica.end
        return {"size": replica.end.size}

    def _begin_stage(self, fields: Fields) -> dict[str, Any]:
        replica = self._opened(fields)
        if self._writes is not None:
            raise _wrong("it stages twice")
        wanted = fields.text("resume")
        if self._partial is not None and self._partial.id == wanted:
            self._stage, self._partial = self._partial, None
        else:
            self._leave_partial()
            most = self._jail.most_staging if self._jail else None
            self._stage = self._held.enter_context(replica.stage(keep=True, most=most))
        self._writes = self._stage.end
        return {"id": self._stage.id, "folder": str(replica.folder)}

    def _leave_partial(self) -> None:
        if self._partial is not None:
            self._partial.drop()
            self._partial = None

    def _write(self, message: Message) -> None:
        rows = message.rows.tolist()
        end = self._checked(rows)
        pieces = digests.layout(rows)
        view, at = self._buffer.view, 0
        for piece in pieces:
            view[piece.at : piece.at + piece.length] = message.data[at : at + piece.length]
            at += piece.length
        with self._room_kept():
            if self._requests:
                end.write_many(pieces, self._buffer, self._requests)
            else:
                for start, length, place in pieces:
                    end.write(view[place : place + length], start)

    def _zero(self, message: Message) -> None:
        rows = message.rows.tolist()
        end = self._checked(rows)
        with self._room_kept():
            for start, length in rows:
                if not (end is self._reads and self._is_zero(start, length)):
                    end.zero(start, length)

    def _is_zero(self, start: int, length: int) -> bool:
        """A hole costs far more than a look."""
        if length > _LOOK:
            return False
        (piece,) = digests.layout([(start, length)])
        assert self._reads is not None
        with contextlib.suppress(EndError):
            self._reads.read_into(self._buffer.view[piece.at : piece.at + length], start)
            return self._buffer.is_zero(piece.at, length)
        return False

    def _checked(self, rows: list[list[int]]) -> Endpoint:
        end = self._writes
        if end is None:
            raise _wrong("it writes before it has begun")
        for start, length in rows:
            if start + length > end.size:
                raise _wrong(f"it writes {Extent(start, length)} of {end.size} bytes")
            if (start | length) % self._unit:
                raise Refused(
                    f"{end.path} has blocks of {self._unit} bytes, and the source an extent of"
                    f" {Extent(start, length)}",
                    hint="use a file as the replica, or a device with smaller logical blocks",
                )
        return end

    @contextlib.contextmanager
    def _room_kept(self) -> Any:
        """A stage that has filled its file system goes, so that others there can go on."""
        try:
            yield
        except EndError as error:
            if self._stage is not None and error.errno in _FULL:
                self._stage.drop()
            raise

    def _compare(self, message: Message) -> None:
        end = self._reads
        rows = message.rows.tolist()
        if end is None or any(start + length > end.size for start, length in rows):
            raise _wrong("it compares what is not there")
        pieces: list[Piece] = digests.layout(rows)
        left = pieces
        if self._requests:
            left = end.read_many(pieces, self._buffer, self._requests)
        for start, length, at in left:
            end.read_into(self._buffer.view[at : at + length], start)
        granularity = int.from_bytes(message.data[:4], "little")
        if granularity < 512:
            raise _wrong("it compares less than a sector")
        try:
            found = digests.answer(pieces, message.data[4:], self._buffer, self._key, granularity)
        except ValueError as error:
            raise _wrong(f"it has not sent {error}") from error
        self._channel.send(pack(Kind.DIGESTS, self._request, data=[b"".join(found)]))

    def _flush(self, fields: Fields) -> None:
        if self._writes is None:
            raise _wrong("it flushes before it has begun")
        if self._stage is None:
            self._writes.flush()
        else:
            with self._room_kept():
                self._stage.checkpoint()
        crash.point("serve-flushed")

    def _seal(self, fields: Fields) -> None:
        stage = self._stage
        if stage is None or stage.point is not None:
            raise _wrong("it seals no stage")
        index = resolve(stage.end.index())
        extents = extent.union(extent.empty(), index[:, :2])
        if digest_of(extents) != fields.text("extents"):
            raise _wrong("what it seals is not what was staged")
        with self._room_kept():
            stage.seal(extents, fields.point("point"))
        self._writes = None

    def _apply(self, fields: Fields) -> None:
        if self._replica is None or self._stage is None or self._stage.point is None:
            raise _wrong("it applies no sealed stage")
        self._replica.apply(self._stage, self.done)
        self._stage = None

    def _commit(self, fields: Fields) -> None:
        replica = self._opened(fields)
        if self._stage is not None or (self._writes is None and not replica.has_point):
            raise _wrong("it commits what has not begun")
        replica.commit(fields.point("point"))
        self._writes = None

    def _opened(self, fields: Fields) -> Replica:
        """The replica, told how large its source is by now."""
        if self._replica is None:
            raise _wrong("it has opened no replica")
        self._replica.source_has(fields.number("size", 1))
        return self._replica

    # What is told of a request that takes long. The source may be gone: then nobody is told.

    def phase(self, name: str, total: int) -> None:
        self._tell({"phase": name, "total": total})

    def done(self, count: int) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY:
            self._told = now
            self._tell({"done": count})

    def warn(self, message: str) -> None:
        self._tell({"warn": message})

    def _tell(self, value: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionLost):
            self._channel.send(pack_json(Kind.PROGRESS, self._request, value))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        if self._requests:
            self._requests.close()


_LOOK = 128 << 10  # bytes of what is to be zero that are looked at before
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


def digest_of(extents: ExtentArray) -> str:
    """By which both sides know that they mean the same extents."""
    return hashlib.blake2b(np.ascontiguousarray(extents, dtype="<i8").data, digest_size=20).hexdigest()


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


def _wrong(what: str) -> BlktrackError:
    return ProtocolError(_SOURCE, what)
