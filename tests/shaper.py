"""What a long, narrow or bad link does to TCP, as a relay in user space. tests/link.py drives it.

The kernel's own (tc netem) is not in every kernel, and tests should see the same link everywhere.
It is a process of its own, so that what is measured does not share its interpreter, and ends with
its standard input.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import struct
import sys
import time
from typing import Any

from tests.lane import Flow, Lane, Shape

SOCKET_BUFFER = 256 * 1024  # bytes; the kernel's share of what waits is not in Shape.buffer
UP, DOWN = "up", "down"  # from near to far, and back
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection


class Relay:
    def __init__(self, target: tuple[str, int], lanes: dict[str, Lane]) -> None:
        self.target, self.lanes = target, lanes
        self.flows: list[tuple[Flow, Flow]] = []
        self.accepted, self.frozen, self.sprung = 0, False, 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._buffers(self.listener)
        self.port = self.listener.getsockname()[1]
        self.epoll = select.epoll()
        self.masks: dict[int, int] = {}

    def _buffers(self, each: socket.socket) -> None:
        each.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            each.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)

    def run(self) -> None:
        commands = os.fdopen(0, "rb", buffering=0)
        self.epoll.register(commands, _READ)
        while True:
            now = time.monotonic()
            for pair in list(self.flows):
                if not self.frozen:
                    self._write(pair, now)
            due = min((flow.due for pair in self.flows for flow in pair), default=float("inf"))
            self._watch()
            # Less than a millisecond is rounded up: the poll does not spin.
            wait = None if self.frozen or due == float("inf") else max(0.0, due - time.monotonic())
            events = dict(self.epoll.poll(wait))
            if 0 in events:
                line = commands.readline()
                if not line:
                    return
                self._obey(json.loads(line))
            self._handle(events, time.monotonic())

    def _write(self, pair: tuple[Flow, Flow], now: float) -> None:
        try:
            for flow in pair:
                flow.write(now)
        except OSError:
            self._drop(pair, reset=True)
        if all(flow.done for flow in pair):
            self._drop(pair, reset=False)
        for lane in self.lanes.values():
            if lane.trap is not None and lane.passed >= lane.trap[0]:
                what, lane.trap = lane.trap[1], None
                self.sprung += 1
                self._do(what)

    def _handle(self, events: dict[int, int], now: float) -> None:
        if self.listener.fileno() in events:
            self._accept()
        for pair in list(self.flows):
            try:
                for flow in pair:
                    if events.get(flow.source.fileno(), 0) & ~_WRITE and flow.wants:
                        flow.read(now)
                    if events.get(flow.sink.fileno(), 0) & ~_READ:
                        flow.blocked = False
            except BlockingIOError:
                pass
            except OSError:
                self._drop(pair, reset=True)

    def _accept(self) -> None:
        try:
            near, _ = self.listener.accept()
        except OSError:
            return
        far = socket.socket()
        for each in (near, far):
            self._buffers(each)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            far.connect(self.target)
        except BlockingIOError:
            pass
        except OSError:  # no way to it, which is known at once
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            near.close()
            far.close()
            return
        self.accepted += 1
        up, down = Flow(near, far, self.lanes[UP]), Flow(far, near, self.lanes[DOWN])
        up.blocked = True  # until it is connected
        self.flows.append((up, down))

    def _drop(self, pair: tuple[Flow, Flow], *, reset: bool) -> None:
        if pair in self.flows:
            self.flows.remove(pair)
            for flow in pair:
                self._mask(flow.source, 0)
                if reset:
                    flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                flow.source.close()

    def _watch(self) -> None:
        """Ask for no event that is not acted upon: an error is told again and again."""
        if self.listener.fileno() >= 0:
            self._mask(self.listener, 0 if self.frozen else _READ)
        for pair in self.flows:
            for flow, back in (pair, pair[::-1]):
                mask = (_READ if flow.wants else 0) | (_WRITE if back.blocked else 0)
                self._mask(flow.source, 0 if self.frozen else mask)

    def _mask(self, each: socket.socket, mask: int) -> None:
        fd = each.fileno()
        before = self.masks.get(fd, 0)
        if mask and not before:
            self.epoll.register(fd, mask)
        elif not mask and before:
            self.epoll.unregister(fd)
        elif mask != before:
            self.epoll.modify(fd, mask)
        self.masks[fd] = mask

    def _obey(self, command: dict[str, Any]) -> None:
        match command.pop("do"):
            case "shape":
                for name, shape in command.items():
                    self.lanes[name].set(Shape(**shape), time.monotonic())
            case "trap":
                lane = self.lanes[command["lane"]]
                lane.trap = (lane.passed + command["after"], command["then"])
            case what:
                self._do(what)
        counts = {
            name: {"taken": lane.taken, "passed": lane.passed} for name, lane in self.lanes.items()
        }
        more = {"accepted": self.accepted, "open": len(self.flows), "sprung": self.sprung}
        print(json.dumps({**counts, **more}), flush=True)

    def _do(self, what: str) -> None:
        match what:
            case "cut" | "refuse":
                for pair in list(self.flows):
                    self._drop(pair, reset=True)
                if what == "refuse" and self.listener.fileno() >= 0:
                    self._mask(self.listener, 0)
                    self.listener.close()
            case "accept" if self.listener.fileno() < 0:
                self.listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
                self._buffers(self.listener)
            case "freeze" | "resume":
                self.frozen = what == "freeze"


def main() -> None:
    address, port, seed = sys.argv[1:]
    lanes = {name: Lane(Shape(), random.Random(f"{seed} {name}")) for name in (UP, DOWN)}
    relay = Relay((address, int(port)), lanes)
    print(relay.port, flush=True)
    relay.run()


if __name__ == "__main__":
    main()
