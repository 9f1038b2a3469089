"""A connection to the keeper of a replica, from its first byte to the last."""

from __future__ import annotations

import contextlib
import threading
from functools import partial

from blktrack.ship.address import Address
from blktrack.ship.limit import Throttle
from blktrack.ship.remote.client import Client
from blktrack.ship.remote.wire import Wire
from blktrack.ship.ssh import Connection
from blktrack.ship.wire import hello
from blktrack.ship.wire.channel import Channel
from blktrack.ship.wire.errors import ConnectionLost, NoKeeper

CONNECT = 20.0  # seconds to reach the host, and as many for what follows
_OF_SSH = (126, 127, 255)  # of a shell that found no program, and of ssh itself


class Link:
    """An open connection. A context manager: leaving it ends it, and waits for the other side."""

    def __init__(self, address: Address, wire: Wire, stop: threading.Event) -> None:
        """ConnectionFailed if there is none to be had, ProtocolError."""
        self.address = address
        self.wire = wire
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(
                Connection.open(
                    address,
                    interactive=wire.interactive,
                    connect_timeout=CONNECT,
                    dead_after=wire.patience,
                )
            )
            pace = Throttle(wire.limit) if wire.limit.least else None
            channel = Channel(
                connection.source,
                connection.sink,
                peer=address.name,
                patience=3600.0 if wire.interactive else 2 * CONNECT,
                pace=pace,
                stop=stop,
            )
            self._connection = connection
            stack.callback(self._count, channel)
            try:
                hello.greet(
                    partial(channel.fill, stop=stop),
                    channel.write,
                    peer=address.name,
                    patience=wire.patience,
                )
            except ConnectionLost as error:
                if stop.is_set():
                    connection.kill()
                    raise
                raise connection.failure(up=False) from error
            except NoKeeper as error:
                failure = connection.failure(up=False)
                if failure.code in _OF_SSH:
                    raise failure from error
                raise
            channel.patience = wire.patience
            self.client = Client(channel, stop, self._explain)
            stack.callback(self.client.close, self._end)
            self._held = stack.pop_all()

    def _count(self, channel: Channel) -> None:
        self.wire.sent += channel.sent
        self.wire.received += channel.received

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.sink.close()

    def _explain(self, error: ConnectionLost) -> Exception:
        """What ssh says of it, if it has ended; silence is told by nobody."""
        if error.silent:
            self._connection.kill()
            return error
        return self._connection.failure(up=True)

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
