"""A replica on another host, as `Replica` is one on this host: what it asks of its keeper."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from blktrack.extent import ExtentArray
from blktrack.observer import ASKING, NOBODY, Observer
from blktrack.point import Point
from blktrack.ship.address import Address
from blktrack.ship.fields import Fields
from blktrack.ship.record import Origin, Record, Seal, State, host_id
from blktrack.ship.remote.connect import Link
from blktrack.ship.remote.end import FarEnd
from blktrack.ship.remote.wire import Wire
from blktrack.ship.wire import digests
from blktrack.ship.wire.message import Kind
from blktrack.sysfs import BlockDevice, boot_id


class FarStage:
    """An increment that is being staged beside a replica elsewhere, where it is kept."""

    def __init__(
        self, replica: RemoteReplica, id: str, size: int, folder: str, free: int | None
    ) -> None:
        """size -- of the source. free -- bytes that can still be staged in `folder` of that host;
        None: nobody knows."""
        self.id = id
        self.folder = f"{replica.address.name}:{folder}"
        self.free = free
        self.end = replica.far_end(size)
        self._replica = replica

    def seal(self, extents: ExtentArray, point: Point) -> None:
        """Have it made durable, and with it that it leads to `point`.

        extents -- all of it, with what earlier connections staged.
        """
        value = {"extents": digests.of_extents(extents), "point": asdict(point)}
        self._replica.ask(Kind.SEAL, value, lasting=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What is durable of it stays."""


class RemoteReplica:
    """An open target on another host. Made by `open`; a context manager.

    Every method raises what the keeper raises, with its name before the message; ConnectionLost.
    """

    link: str
    record: Record | None  # as found, then as last written
    changed: str
    blank: bool
    can_stage: bool  # whether an increment may lie beside it
    end: FarEnd

    def __init__(self, link: Link, source: BlockDevice) -> None:
        self.source = source
        self.address = link.address
        self.name = str(link.address)
        self._link = link
        self._wire = link.wire
        self._key = os.urandom(digests.KEY_SIZE)
        self._held = contextlib.ExitStack()
        self._stage, self._stage_size = "", 0  # what is staged there, and for how large a source
        self._mark = 0  # how much of it was there when it was opened
        self._staged: FarStage | None = None  # by this connection
        self.writes: list[Path] = []  # on this host, if the keeper is on it too

    @classmethod
    def open(
        cls,
        address: Address,
        *,
        source: BlockDevice,
        link: str | None,
        wire: Wire,
        stop: threading.Event,
        force: bool = False,
        writable: bool = True,
        observer: Observer = NOBODY,
    ) -> Self:
        """As Replica.open. Not writable: only to be compared, whatever it is."""
        with contextlib.ExitStack() as held:
            observer.phase(ASKING if wire.interactive else f"connecting to {address.name}", 0)
            replica = cls(held.enter_context(Link(address, wire, stop)), source)
            observer.phase(f"waiting for {address.name}", 0)
            origin = Origin.of(source, "")
            found = replica._link.client.request(
                Kind.OPEN,
                {
                    "target": address.path,
                    "source": asdict(origin) | {"host": host_id()},
                    "link": link,
                    "force": force,
                    "writable": writable,
                    "key": replica._key.hex(),
                    "boot": boot_id(),
                    "major": source.number[0],
                    "minor": source.number[1],
                },
                observer=observer,
            )
            replica._take(found, writable=writable)
            replica._stage_size = origin.size
            replica._held = held.pop_all()
        return replica

    def _take(self, found: Fields, *, writable: bool) -> None:
        self.end = self.far_end(found.number("size"))
        if not writable:
            return
        self.link = found.uuid("link")
        self.record = _record(found)
        self.changed = found.text("changed")
        self.blank = found.flag("blank")
        self.can_stage = found.flag("stages")
        self._stage, self._mark = found.text("stage"), found.number("mark")
        if found.text("boot") == boot_id():
            paths = found.get("writes")
            self.writes = [Path(str(path)) for path in paths] if isinstance(paths, list) else []

    def far_end(self, size: int) -> FarEnd:
        return FarEnd(self.name, size, self._link.client, self._key, self._wire)

    @property
    def stage_id(self) -> str:
        """Of what is staged for the next point and can be gone on with; "" if nothing is. A stage
        is for a source of one size."""
        return self._stage if self._stage_size == self.source.size else ""

    @property
    def stage_mark(self) -> int:
        """How much of it is there, as `FarStage.mark` told it before."""
        return max(self._mark, self._staged.end.mark if self._staged else 0)

    @property
    def has_point(self) -> bool:
        """Whether its bytes are those of a point, to be kept until there is another."""
        record = self.record
        ready = record is not None and record.state is State.READY and record.point is not None
        return ready and not self.changed

    @property
    def existing_state(self) -> State | None:
        return self.record.state if self.record else None

    def check_room(self) -> None:
        """Refused if it cannot hold the source as that is by now."""
        self.ask(Kind.ROOM, {})

    def stage(self, resume: str, size: int) -> FarStage:
        """Begin an increment of a source of `size` bytes, or go on with the one of this id, if it
        is there and of that size."""
        found = self.ask(Kind.STAGE, {"resume": resume, "size": size})
        self._stage = found.uuid("id")
        if self._stage != resume:
            self._stage_size, self._mark = size, 0
        free = found.number("free") if found.has("free") else None
        self._staged = FarStage(self, self._stage, size, found.text("folder"), free)
        return self._staged

    def apply(
        self,
        stage: FarStage,
        progress: Callable[[int], None],
        stop: threading.Event | None = None,
    ) -> None:
        """Bring the replica to the point of a sealed stage. Once asked for it goes on there,
        whatever becomes of this run."""
        self.ask(Kind.APPLY, {}, observer=_Progress(progress), lasting=True)
        self._stage = ""

    def begin(self, state: State, generation: str) -> None:
        found = self.ask(Kind.BEGIN, {"state": str(state), "generation": generation})
        self.end = self.far_end(found.number("size"))
        self._stage = ""
        point = self.record.point if self.record and state is State.APPLYING else None
        self._note(state, generation, point)

    def commit(self, point: Point) -> None:
        self.ask(Kind.COMMIT, {"point": asdict(point)}, lasting=True)
        self.changed = ""
        self._note(State.READY, point.generation, point)

    def _note(self, state: State, generation: str, point: Point | None) -> None:
        """What its record says by now; the seal is the keeper's."""
        origin = Origin.of(self.source, generation)
        self.record = Record(self.link, origin, state, point, Seal(origin.size, "", "", "", ""))

    def ask(
        self,
        kind: Kind,
        value: dict[str, Any],
        *,
        observer: Observer = NOBODY,
        lasting: bool = False,
    ) -> Fields:
        """Of the keeper, which is told how large the source is by now."""
        value.setdefault("size", self.source.size)
        return self._link.client.request(kind, value, observer=observer, lasting=lasting)

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Progress:
    """Of bytes that are applied there: of what phase they are is known here."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.done = progress

    def phase(self, name: str, total: int) -> None: ...

    def warn(self, message: str) -> None: ...


def _record(found: Fields) -> Record | None:
    """What is told of the record: its seal is the keeper's to judge."""
    if not found.has("record"):
        return None
    record = found.inner("record")
    source = record.inner("source")
    state = record.text("state")
    if state not in tuple(State):
        record.refuse("state")
    return Record(
        link=record.uuid("link"),
        source=Origin(
            source.text("device"),
            source.text("name"),
            source.number("size"),
            source.text("generation"),
            source.text("host"),
        ),
        state=State(state),
        point=record.point("point") if record.has("point") else None,
        seal=Seal(source.number("size"), "", "", "", ""),
        next=record.point("next") if record.has("next") else None,
    )
