"""What the keeper has received and not dealt with yet: bounded, so that a slow disk slows the
sender down, and read on meanwhile, so that a sender that is gone is noticed."""

from __future__ import annotations

import threading
import time
from collections import deque

from blktrack.ship.wire.channel import LAST, Channel
from blktrack.ship.wire.errors import ConnectionLost
from blktrack.ship.wire.message import Kind, Message

_MOST = 16 << 20  # bytes that wait


class Inbox:
    """Messages in order, then how the connection ended. One thread takes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._changed = threading.Condition()
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self._ended: Exception | None = None
        self._dropping = False
        threading.Thread(target=self._fill, name="inbox", daemon=True).start()

    def take(self) -> Message | None:
        """The next one; None where the source ended the connection. What else ended it raises."""
        with self._changed:
            while not self._messages and self._ended is None:
                self._changed.wait()
            if self._messages:
                message = self._messages.popleft()
                self._bytes -= _size(message)
                self._changed.notify_all()
                return message
        if isinstance(self._ended, ConnectionLost):
            return None
        assert self._ended is not None
        raise self._ended

    def drop(self, seconds: float) -> None:
        """Take and forget until the source ends the connection, or for so long."""
        until = time.monotonic() + seconds
        with self._changed:
            self._dropping = True
            self._messages.clear()
            self._bytes = 0
            self._changed.notify_all()
            while self._ended is None and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def _fill(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if message.kind is not Kind.PING:
                    self._put(message)
        except Exception as error:  # raised again by take
            if isinstance(error, ConnectionLost):
                self._channel.hurry(LAST)
            with self._changed:
                self._ended = error
                self._changed.notify_all()

    def _put(self, message: Message) -> None:
        with self._changed:
            while self._bytes > _MOST and not self._dropping:
                self._changed.wait()
            if not self._dropping:
                self._messages.append(message)
                self._bytes += _size(message)
            self._changed.notify_all()


def _size(message: Message) -> int:
    return message.rows.nbytes + len(message.data) + 512
