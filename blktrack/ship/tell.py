"""What a replica says of itself on its own host: the point that it holds, and what waits for it."""

from __future__ import annotations

from blktrack.config import Paths
from blktrack.errors import BlktrackError
from blktrack.observer import NOBODY, Observer
from blktrack.report import ReplicaStatus
from blktrack.ship.apply import finish
from blktrack.ship.place import inspect
from blktrack.ship.record import State

_NO_POINT = {
    State.UNFINISHED: "a full copy or a resync of it has not ended",
    State.APPLYING: "an increment is half in it",
}


def replica_status(name: str, paths: Paths, observer: Observer = NOBODY) -> ReplicaStatus | None:
    """The replica at `name`, brought to its next point first if that waits complete; None if it is
    no replica.

    Where it cannot be brought there now, because another run has it say, it is told as it is.
    """
    why_not = ""
    try:
        finish(name, paths, observer=observer)
    except BlktrackError as error:
        why_not = str(error)
    record, change = inspect(name, paths)
    if record is None:
        return None
    state, reason = str(record.state), change or _NO_POINT.get(record.state, "")
    if record.state is State.READY and change:
        state = "changed"
    elif record.state is State.READY and record.next:
        state = "waiting"
    point, following = record.point, record.next
    return ReplicaStatus(
        target=name,
        source=record.source.device,
        link=record.link,
        state=state,
        reason=reason if not why_not or why_not == reason else f"{reason}; {why_not}".lstrip("; "),
        epoch=point.epoch if point else None,
        point=point.time if point else None,
        consistency=point.consistency if point else None,
        next_epoch=following.epoch if following else None,
        next_point=following.time if following else None,
    )
