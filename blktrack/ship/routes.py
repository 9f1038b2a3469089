"""The network's side of a replica on another host: when its path may be back, and which it is.

The kernel tells by rtnetlink of links that come up, and of addresses and routes that are set. None
of it says that the far host answers, only that it is time to try.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import subprocess
import threading
import time
from types import TracebackType
from typing import Any, Self

from blktrack.ship.address import SCHEME, Address, is_remote
from blktrack.ship.ssh import settings

# linux/rtnetlink.h. RTMGRP_LINK, and of both families RTMGRP_*_IFADDR and RTMGRP_*_ROUTE.
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 16, 20, 24, 25
_RTN_REFUSING = {6, 7, 8}  # blackhole, unreachable, prohibit
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH)  # of a look for a route
_IFF_RUNNING = 0x40  # linux/if.h: up, and with a carrier

_SLICE = 0.1  # seconds: how soon a wait sees that it is to stop
_QUIET = 0.2  # what happens in a row, within so many seconds each, is one thing
_BURST = 1.0  # but no longer than this
_PATIENCE = 1.0  # seconds that telling a route may take


def _parsed(data: bytes) -> list[Any]:
    from pyroute2.netlink.rtnl.marshal import MarshalRtnl

    return list(MarshalRtnl().parse(data))


class PathWatch:
    """News of the network, from the time that its context is entered on.

    What happened between two waits ends the next one at once. Where there is no netlink, or no
    pyroute2 to read it, a wait lasts until its end.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._running: dict[int, bool] = {}  # of links by their index

    def wait(self, timeout: float, stop: threading.Event) -> bool:
        """Wait up to `timeout` seconds or until `stop` is set; whether there were news that may
        bring a path back. It waits a little for those that follow on each other."""
        deadline = time.monotonic() + timeout
        while not stop.is_set():
            if self._socket is None:
                stop.wait(max(0.0, deadline - time.monotonic()))
                return False
            if self._news(min(_SLICE, deadline - time.monotonic())):
                self._settle(stop)
                return True
            if time.monotonic() >= deadline:
                return False
        return False

    def _settle(self, stop: threading.Event) -> None:
        deadline = time.monotonic() + _BURST
        while not stop.is_set() and time.monotonic() < deadline:
            if not self._news(_QUIET):
                return

    def _news(self, timeout: float) -> bool:
        """Take in what has come, waiting `timeout` seconds for the first; whether it matters."""
        if self._socket is None:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll(max(0.0, timeout) * 1000)
        found = False
        try:
            while True:
                # Each is looked at, for what it says of a link.
                for message in _parsed(self._socket.recv(1 << 16)):
                    found |= self._matters(message)
        except BlockingIOError:
            return found
        except OSError as error:
            if error.errno == errno.ENOBUFS:  # more came than was taken in: something of it may
                return True
        except Exception:  # no pyroute2, or what it makes of a message that it does not know
            pass
        self._close()
        return found

    def _matters(self, message: Any) -> bool:
        kind = message["header"]["type"]
        if kind == _RTM_NEWLINK:  # which tells of any change of a link
            running = bool(message["flags"] & _IFF_RUNNING)
            was, self._running[message["index"]] = self._running.get(message["index"]), running
            return running and not was
        if kind == _RTM_DELROUTE:
            return message["type"] in _RTN_REFUSING
        return kind == _RTM_NEWADDR or (
            kind == _RTM_NEWROUTE and message["type"] not in _RTN_REFUSING
        )

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        try:
            # Its own socket, not that of an IPRoute: from 0.9 on that one takes in more than it
            # gives, so that nobody can wait for it and for anything else at once.
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
            )
            self._socket.bind((0, _GROUPS))
        except OSError:
            self._close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()


class RouteLook:
    """A look for the way that a connection takes by now, while that is made."""

    def __init__(self, address: Address) -> None:
        self._found: list[str] = []
        self._until = time.monotonic() + _PATIENCE
        # A daemon: nobody waits any longer for a name server that does not answer.
        self._thread = threading.Thread(
            target=self._look, args=[address], name="route", daemon=True
        )
        self._thread.start()

    def told(self) -> str:
        """What was found: "192.0.2.7 via 192.0.2.1 dev eth0".

        Of a host behind others it is the way to the first: "jump host gate: 192.0.2.9 dev eth0". ""
        if it cannot be told within a second of the beginning, as where a name is not resolved.
        """
        self._thread.join(max(0.0, self._until - time.monotonic()))
        return self._found[0] if self._found else ""

    def _look(self, address: Address) -> None:
        with contextlib.suppress(Exception):  # what is shown beside a link must not be its trouble
            self._found.append(_route(address))


def _route(address: Address) -> str:
    asked = settings(address)
    if (jumps := asked.get("proxyjump", "none")) != "none":
        jump = _jump(jumps.partition(",")[0])
        return f"jump host {jump.host}: {_way(settings(jump).get('hostname', jump.host))}"
    if asked.get("proxycommand", "none") != "none":
        return "by a ProxyCommand"
    return _way(asked.get("hostname", address.host))


def _jump(text: str) -> Address:
    """A ProxyJump of ssh's configuration: an address without path, or [user@]host[:port]."""
    return Address.parse(f"{text if is_remote(text) else SCHEME + text}/-")


def _way(host: str) -> str:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    place: tuple[Any, ...] = tuple(found[4])
    number = str(place[0]).partition("%")[0]
    # Of an address of a link.
    scope = ["oif", socket.if_indextoname(place[3])] if len(place) > 3 and place[3] else []
    # ip(8) of iproute2: pyroute2 takes a quarter of a second of the processor to be there.
    done = subprocess.run(
        ["ip", "-json", "route", "get", number, *scope],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_PATIENCE,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if any(os.strerror(code).encode() in done.stderr for code in _NO_ROUTE):
        return f"no route to {number}"
    route = json.loads(done.stdout)[0]
    via = f" via {route['gateway']}" if "gateway" in route else ""
    return f"{number}{via} dev {route['dev']}"
