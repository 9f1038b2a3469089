"""The keeper: serves one source on another host, over one connection, with one replica.

It trusts nothing of what it is told: `ship.wire.message` checks the form, `session` and `data` the
sense. It never sends what a replica holds, only digests of it. Whatever ends the connection, the
replica is at a point or on its way to one, as with a sync on this host that died; what of an
increment is durable here stays, for the next connection to go on with.
"""

from __future__ import annotations

import contextlib
from typing import Any

from blktrack.config import Paths
from blktrack.errors import BlktrackError
from blktrack.ship.delta.pipe import Sink, Source
from blktrack.ship.fields import sayable
from blktrack.ship.jail import Jail
from blktrack.ship.keeper.session import Session
from blktrack.ship.keeper.wrong import SOURCE
from blktrack.ship.wire import hello
from blktrack.ship.wire.channel import Channel
from blktrack.ship.wire.inbox import Inbox
from blktrack.ship.wire.message import Kind, pack_json

_LINGER = 5.0  # seconds for the source to take note of an error


def serve(source: Source, sink: Sink, paths: Paths, jail: Jail | None) -> None:
    """Serve one source until it ends the connection.

    jail -- which targets it may have; None: any.

    Raises BlktrackError, of which the source has been told if that was possible.
    """
    channel = Channel(source, sink, peer=SOURCE, patience=hello.PATIENCE)
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
    except Exception as error:
        with contextlib.suppress(BlktrackError):
            channel.send(pack_json(Kind.FAILED, request, _told(error)))
        inbox.drop(_LINGER)
        raise
    finally:
        channel.close()


def _told(error: Exception) -> dict[str, Any]:
    if not isinstance(error, BlktrackError):
        error = BlktrackError(f"it failed: {str(error) or type(error).__name__}")
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {
        "message": sayable(str(error)),
        "hint": sayable(error.hint),
        "exit": error.exit_code,
        "kinds": kinds[: kinds.index(BlktrackError.__name__) + 1],
    }
