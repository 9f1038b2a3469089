"""One direction of a link that is long, narrow or bad: when what is sent arrives (tests/shaper.py).

What is read gets its turn on the lane, one after the other as the rate allows, then travels for the
delay, then is written. What waits for its turn is bounded, so whoever sends too fast is held up as
by a full queue in a router.

A relay cannot lose a packet. What TCP makes of loss, for whoever uses it, is a pause for the time
of a retransmission: so the lane pauses now and then, for all connections at once.
"""

from __future__ import annotations

import random
import socket
from collections import deque
from dataclasses import dataclass, field

_MOST, _LEAST = 256 * 1024, 1460  # bytes read at once
_TICK = 0.004  # seconds that one chunk takes its lane for, to be fair to other connections


@dataclass(frozen=True)
class Shape:
    """One direction of a link."""

    rate: float = 0.0  # bytes per second; 0 is without limit
    delay: float = 0.0  # seconds; there and back is twice that
    buffer: int = 0  # bytes of a connection that wait; 0 is a second of the rate, or 4 MiB
    stalls: float = 0.0  # per second that the link runs, at random
    stall: float = 0.2  # seconds of each: TCP_RTO_MIN in include/net/tcp.h

    @property
    def usable(self) -> float:
        """Bytes per second that are left of the rate by stalls."""
        return self.rate / (1 + self.stalls * self.stall)

    @property
    def room(self) -> int:
        """Bytes of a connection under way at most."""
        waiting = self.buffer or int(self.rate) or 4 << 20
        return waiting + int((self.rate or 256e6) * self.delay)

    @property
    def chunk(self) -> int:
        return max(_LEAST, min(_MOST, int(self.rate * _TICK))) if self.rate else _MOST


@dataclass
class Lane:
    """A direction of the link, of all its connections."""

    shape: Shape
    dice: random.Random
    taken: int = 0  # bytes read of those that send
    passed: int = 0  # bytes written to those that receive
    trap: tuple[int, str] | None = None  # at how many passed bytes to do what
    _free: float = 0.0
    _next_stall: float = field(default=float("inf"))

    def set(self, shape: Shape, now: float) -> None:
        self.shape = shape
        self._free = min(self._free, now)
        self._next_stall = now + self._until_stall()

    def arrival(self, size: int, now: float) -> float:
        """When what is read now is at the other end."""
        start = max(self._free, now)
        while start >= self._next_stall:
            start = max(start, self._next_stall + self.shape.stall)
            self._next_stall += self.shape.stall + self._until_stall()
        self._free = start + (size / self.shape.rate if self.shape.rate else 0)
        return self._free + self.shape.delay

    def _until_stall(self) -> float:
        return self.dice.expovariate(self.shape.stalls) if self.shape.stalls else float("inf")


class Flow:
    """What goes from one socket to another on a lane."""

    def __init__(self, source: socket.socket, sink: socket.socket, lane: Lane) -> None:
        self.source, self.sink, self.lane = source, sink, lane
        self.queue: deque[tuple[float, memoryview]] = deque()  # an empty one is the end
        self.held = 0
        self.ended = False  # of the source
        self.done = False  # and the sink was told
        self.blocked = False  # the sink takes no more now

    @property
    def due(self) -> float:
        return self.queue[0][0] if self.queue and not self.blocked else float("inf")

    @property
    def wants(self) -> bool:
        return not self.ended and self.held < self.lane.shape.room

    def read(self, now: float) -> None:
        data = self.source.recv(min(self.lane.shape.chunk, self.lane.shape.room - self.held))
        self.ended = not data
        self.held += len(data)
        self.lane.taken += len(data)
        last = self.queue[-1][0] if self.queue else 0.0
        self.queue.append((max(last, self.lane.arrival(len(data), now)), memoryview(data)))

    def write(self, now: float) -> None:
        """What has arrived; no more than to a trap."""
        while self.due <= now:
            when, data = self.queue.popleft()
            if not data:
                self.sink.shutdown(socket.SHUT_WR)
                self.done = True
                return
            most = len(data)
            if self.lane.trap is not None:
                most = min(most, self.lane.trap[0] - self.lane.passed)
            try:
                sent = self.sink.send(data[:most]) if most else 0
            except BlockingIOError:
                sent, self.blocked = 0, True
            self.held -= sent
            self.lane.passed += sent
            if sent < len(data):
                self.queue.appendleft((when, data[sent:]))
            if most == sent < len(data):
                return  # the trap
