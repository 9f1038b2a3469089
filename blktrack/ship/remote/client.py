"""Requests to the keeper of a replica, and its answers to them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from blktrack import errors
from blktrack.errors import BlktrackError
from blktrack.observer import NOBODY, Observer
from blktrack.ship.fields import Fields
from blktrack.ship.wire.channel import Channel
from blktrack.ship.wire.errors import ConnectionLost, ProtocolError
from blktrack.ship.wire.message import Kind, Message, pack_json

_LOOK = 0.2  # seconds after which who waits for an answer looks up
_GRACE = 10.0  # seconds that an answer may take once the run is to end
_REASON = 5.0  # seconds that the reason of an end may come after it
_MOST_TOLD = 100  # words of progress that wait
# Classes of errors of the other side that are made again here; others become their base.
_AGAIN = ("NotTracked", "NoPoint", "Busy", "UsageError", "Refused", "DeviceLost", "CopyFailed")


class Client:
    """Thread-safe. What fails, fails for all: an error of the keeper ends the connection."""

    def __init__(
        self,
        channel: Channel,
        stop: threading.Event,
        explain: Callable[[ConnectionLost], Exception],
    ) -> None:
        """explain -- why the connection was lost, if more is known of that."""
        self._channel = channel
        self._explain = explain
        self._stop = stop
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._boxes: dict[int, queue.SimpleQueue[Message | Exception]] = {}
        self._error: Exception | None = None
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="answers", daemon=True)
        self._reader.start()
        channel.beat(Kind.PING)

    def close(self, end: Callable[[], None]) -> None:
        """Pass on what waits, `end` the stream to the keeper, and wait for it to end its own."""
        self._closing = True
        self._channel.close()
        end()
        self._reader.join(timeout=_GRACE)

    def tell(self, parts: Sequence[bytes | memoryview], *, now: bool = False) -> float:
        """Send what has no answer; the seconds that sending took."""
        try:
            return self._channel.send(parts, now=now)
        except ConnectionLost as error:
            raise self._why(error) from None

    def request(
        self,
        kind: Kind,
        value: dict[str, Any],
        *,
        observer: Observer = NOBODY,
        lasting: bool = False,
    ) -> Fields:
        """Send a request, and wait for its answer.

        lasting -- it goes on there, whatever becomes of this run, which need not wait for it.
        """
        message = self.ask(
            lambda number: pack_json(kind, number, value), observer=observer, lasting=lasting
        )
        if message.kind is not Kind.DONE:
            raise self._wrong(f"it answers {kind.name} by {message.kind.name}")
        return Fields.parse(message.json(), "answer", self._wrong)

    def ask(
        self,
        make: Callable[[int], Sequence[bytes | memoryview]],
        *,
        observer: Observer = NOBODY,
        lasting: bool = False,
    ) -> Message:
        """The same with any message; `make` is given the number of the request."""
        box: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        with self._lock:
            number = next(self._numbers)
            self._boxes[number] = box
        try:
            self.tell(make(number), now=True)
            return self._answer(box, observer, 0.0 if lasting else _GRACE)
        finally:
            with self._lock:
                self._boxes.pop(number, None)

    def _answer(
        self, box: queue.SimpleQueue[Message | Exception], observer: Observer, grace: float
    ) -> Message:
        until: float | None = None
        while True:
            try:
                found = box.get(timeout=_LOOK)
            except queue.Empty:
                if self._error is not None:
                    raise self._error from None
                if self._stop.is_set():
                    until = until or time.monotonic() + grace
                    if time.monotonic() >= until:
                        lost = ConnectionLost(self._channel.peer, "it was given up")
                        raise lost from None
                continue
            if isinstance(found, Exception):
                raise found
            if found.kind is not Kind.PROGRESS:
                return found
            self._show(Fields.parse(found.json(), "progress", self._wrong), observer)

    def _show(self, told: Fields, observer: Observer) -> None:
        if told.has("phase"):
            observer.phase(told.text("phase"), told.number("total"))
        elif told.has("done"):
            observer.done(told.number("done"))
        elif told.has("warn"):
            observer.warn(f"{self._channel.peer}: {told.text('warn')}")

    def _read(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if message.kind is Kind.ALIVE:
                    continue
                if message.kind is Kind.FAILED:
                    raise self._told(Fields.parse(message.json(), "error", self._wrong))
                self._put(message)
        except ConnectionLost as error:
            self._fail(error if self._closing else self._explain(error))
        except Exception as error:  # handed to whoever waits, and to whoever sends
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._channel.fail(error)
        with self._lock:
            for box in self._boxes.values():
                box.put(error)

    def _put(self, message: Message) -> None:
        """A request has one answer; of progress what is too much is left out."""
        told = message.kind is Kind.PROGRESS
        with self._lock:
            box = self._boxes.get(message.request)
            if box is None or (told and box.qsize() > _MOST_TOLD):
                return
            if not told:
                del self._boxes[message.request]
            box.put(message)

    def _why(self, error: ConnectionLost) -> Exception:
        """The keeper may have said why it ended; its last words come after the end of the pipe."""
        self._reader.join(_REASON)
        return self._error or error

    def _told(self, fields: Fields) -> BlktrackError:
        kinds = fields.get("kinds")
        known = [kind for kind in _AGAIN if isinstance(kinds, list) and kind in kinds]
        make: type[BlktrackError] = getattr(errors, known[0]) if known else BlktrackError
        error = make(f"{self._channel.peer}: {fields.text('message')}", hint=fields.text("hint"))
        error.exit_code = fields.number("exit", 1, 255)
        return error

    def _wrong(self, what: str) -> BlktrackError:
        return ProtocolError(self._channel.peer, what)
