"""Both directions of a connection: messages whole, silence noticed, what is small gathered.

A side that has nothing to say says so several times within the other's patience. Silence is
counted only while the other side is listened to, and any byte ends it: a slow link is no dead one.

Where nothing can be sent any more, what the other side said before is still received: it may be
the reason.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from blktrack.ship.delta.pipe import Sink, Source
from blktrack.ship.wire.errors import ConnectionLost, ProtocolError
from blktrack.ship.wire.message import Kind, Malformed, Message, Reader, pack

LAST = 5.0  # seconds that a writer waits for a side that may have ended
_GRACE = 10.0  # seconds that it waits once the run is to end
_GATHER = 64 << 10  # bytes of small messages that wait for each other
_SLICE = 64 << 10  # bytes written at once, at most
_LOOK = 200  # milliseconds after which a writer that waits looks up
_BEATS = 4  # within the other side's patience


class Pace(Protocol):
    """How fast may be sent."""

    @property
    def slice(self) -> int:
        """How many bytes at a time."""

    def wait(self, count: int, stop: threading.Event) -> bool:
        """Wait until so many bytes may be sent; False if `stop` was set first."""


class Channel:
    """Thread-safe to send; one thread receives. ConnectionLost, ProtocolError."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        *,
        peer: str,
        patience: float,
        pace: Pace | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """stop -- the run is to end: what is sent then keeps no pace, and waits not for long."""
        self.peer = peer
        self.patience = patience
        self.sent = self.received = 0  # bytes
        self._source, self._sink = source, sink
        self._pace = pace
        self._stop = stop or threading.Event()
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._closed = threading.Event()
        self._error: Exception | None = None  # why it is closed
        self._broken: Exception | None = None  # why nothing can be sent
        self._until = math.inf  # when a writer that waits gives up
        self._poll = select.poll()
        self._poll.register(source.fileno(), select.POLLIN)
        self._reader = Reader(self.fill)
        os.set_blocking(sink.fileno(), False)

    def send(self, parts: Sequence[bytes | memoryview], *, now: bool = True) -> float:
        """Send a message; the seconds that this took, without waiting for other senders.

        Not `now`: it may wait for the next one, or for a beat.
        """
        with self._lock:
            begun = time.monotonic()
            self._check()
            for part in parts:
                if len(part) >= _GATHER:
                    self._pass_on()
                    self._write(part)
                else:
                    self._waiting += part
            if now or len(self._waiting) >= _GATHER:
                self._pass_on()
            return time.monotonic() - begun

    def write(self, data: bytes) -> None:
        """Send what is no message."""
        with self._lock:
            self._write(data)

    def receive(self) -> Message:
        """The next message. ConnectionLost where the other side ended, or is silent."""
        try:
            return self._reader.next()
        except Malformed as error:
            raise ProtocolError(self.peer, str(error)) from error

    def fill(self, view: memoryview, *, stop: threading.Event | None = None) -> None:
        """Fill a view with what comes, whatever that is. ConnectionLost, also if `stop` was set."""
        done = 0
        while done < len(view):
            self._await(time.monotonic() + self.patience, stop)
            try:
                count = self._source.readinto(view[done:])
            except OSError as error:
                raise self._lost(os.strerror(error.errno or 0)) from error
            except ValueError as error:  # its owner has closed it
                raise self._lost("it was closed") from error
            if count == 0:
                raise self._lost("it ended")
            done += count or 0
            self.received += count or 0

    def _await(self, until: float, stop: threading.Event | None) -> None:
        while not self._poll.poll(_LOOK):
            if stop is not None and stop.is_set():
                raise self._lost("it was given up")
            if self._closed.is_set():
                raise self._error or self._lost("it was closed")
            if time.monotonic() > until:
                why = f"nothing was heard for {self.patience:g} s"
                raise ConnectionLost(self.peer, why, silent=True)

    def beat(self, kind: Kind) -> None:
        """From now on let the other side know that this one lives."""
        threading.Thread(target=self._beat, args=[kind], name="beat", daemon=True).start()

    def _beat(self, kind: Kind) -> None:
        message = pack(kind)
        while not self._closed.wait(self.patience / _BEATS):
            try:
                self.send(message)
            except Exception:  # whoever sends what counts meets it too
                return

    def hurry(self, seconds: float) -> None:
        """Whoever sends waits for so long at most for the other side to take something."""
        self._until = min(self._until, time.monotonic() + seconds)

    def fail(self, error: Exception) -> None:
        """Nothing more is sent: whoever tries meets this error. The first one counts."""
        self._error = self._error or error
        self._closed.set()

    def close(self) -> None:
        """Pass on what waits, and end."""
        self.hurry(LAST)
        with contextlib.suppress(Exception), self._lock:  # it has failed before, with a reason
            self._pass_on()
        self.fail(self._lost("it was closed"))

    def _pass_on(self) -> None:
        waiting, self._waiting = self._waiting, bytearray()
        if waiting:
            self._write(waiting)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        """All of it, or never anything again: the other side could not tell what it is."""
        try:
            with memoryview(data) as whole, whole.cast("B") as view:
                done = 0
                while done < len(view):
                    size = min(self._pace.slice, _SLICE) if self._pace else _SLICE
                    done += self._write_slice(view[done : done + size])
        except BaseException as error:
            why = error if isinstance(error, Exception) else self._lost("a message was cut off")
            self._broken = self._broken or why
            raise

    def _write_slice(self, view: memoryview) -> int:
        if self._pace is not None:
            self._pace.wait(len(view), self._stop)
        done = 0
        while done < len(view):
            self._check()
            try:
                count = self._sink.write(view[done:])
            except OSError as error:
                raise self._lost(os.strerror(error.errno or 0)) from error
            if count is None:
                self._writable()
            else:
                done += count
                self.sent += count
        return done

    def _check(self) -> None:
        if (failed := self._error if self._closed.is_set() else self._broken) is not None:
            raise failed

    def _writable(self) -> None:
        poll = select.poll()
        poll.register(self._sink.fileno(), select.POLLOUT)
        if poll.poll(_LOOK):
            return
        if self._stop.is_set():
            self.hurry(_GRACE)
        if time.monotonic() > self._until:
            raise self._lost("it takes nothing")

    def _lost(self, why: str) -> ConnectionLost:
        return ConnectionLost(self.peer, why)
