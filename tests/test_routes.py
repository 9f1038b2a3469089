"""News of the network and the way to a host, in a network of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blktrack.ship import routes
from blktrack.ship.address import Address
from blktrack.ship.retry import Retry
from blktrack.ship.routes import PathWatch, RouteLook
from tests.needs import TOOL_PATH

pytestmark = pytest.mark.needs("root")

CLONE_NEWNET = 0x40000000  # linux/sched.h
NEVER, LONG, SHORT = threading.Event(), 30.0, 0.3
NEAR, FAR = "10.77.0.1", "10.77.0.2"


class Network:
    """The network of this thread: a cable `near0`, whose other end is `far0`, and lo."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        # A second later each link would get an address by itself, and with that there were news.
        Path("/proc/sys/net/ipv6/conf/default/addr_gen_mode").write_text("1", encoding="ascii")
        kernel.link("add", ifname="near0", kind="veth", peer="far0")
        self.near, self.far = (kernel.link_lookup(ifname=name)[0] for name in ("near0", "far0"))
        self.set("lo", "up")

    def set(self, name: str, state: str) -> None:
        self.kernel.link("set", index=self.kernel.link_lookup(ifname=name)[0], state=state)

    def join(self) -> None:
        self.kernel.addr("add", index=self.near, address=NEAR, prefixlen=24)
        self.set("near0", "up")
        self.set("far0", "up")


def in_own_network(body: Callable[[Network], None]) -> None:
    """In a thread, whose network ends with it: that of the test run stays as it is."""
    failed: list[BaseException] = []

    def work() -> None:
        from pyroute2 import IPRoute

        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            with IPRoute() as kernel:
                body(Network(kernel))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def calm(watch: PathWatch) -> None:
    """What has been done has been told."""
    while watch.wait(SHORT, NEVER):
        pass


@contextlib.contextmanager
def later(act: Callable[[], object]) -> Iterator[None]:
    """While the body waits, most likely."""
    timer = threading.Timer(0.2, act)
    timer.start()
    yield
    timer.join()


def test_what_brings_a_path_back_ends_a_wait() -> None:
    def body(network: Network) -> None:
        network.join()
        kernel, through = network.kernel, {"gateway": FAR}
        with PathWatch() as watch:
            calm(watch)
            for name in ("far0", "near0"):  # the cable is pulled, then the interface is down
                network.set(name, "down")
                assert not watch.wait(SHORT, NEVER)
            network.set("near0", "up")  # without a carrier, but its routes are set again
            calm(watch)
            brings: list[Callable[[], object]] = [
                lambda: network.set("far0", "up"),
                lambda: kernel.addr("add", index=network.near, address="10.78.0.1", prefixlen=24),
                lambda: kernel.route("add", dst="10.79.0.0/16", **through),
                lambda: kernel.route("add", dst="2001:db8::/32", oif=network.near),
            ]
            for back in brings:
                with later(back):
                    assert watch.wait(LONG, NEVER)
                assert not watch.wait(SHORT, NEVER), "it was one thing, but taken for several"
            takes: list[Callable[[], object]] = [
                lambda: kernel.route("del", dst="10.79.0.0/16", **through),
                lambda: kernel.addr("del", index=network.near, address="10.78.0.1", prefixlen=24),
                lambda: kernel.link("set", index=network.near, mtu=1400),
                lambda: kernel.route("add", dst="10.79.0.0/16", type="unreachable"),
                lambda: kernel.route("add", dst="10.80.0.0/16", type="blackhole"),
            ]
            for gone in takes:
                gone()
                assert not watch.wait(SHORT, NEVER)
            kernel.route("del", dst="10.79.0.0/16", type="unreachable")
            assert watch.wait(LONG, NEVER)

    in_own_network(body)


def test_a_retry_comes_with_the_link() -> None:
    def body(network: Network) -> None:
        network.join()
        network.set("far0", "down")
        with PathWatch() as watch:
            calm(watch)
            retry = Retry(3600, NEVER, watch)
            retry._delay = 1000.0
            with later(lambda: network.set("far0", "up")):
                assert retry.wait()
            assert retry.left > 3600 - 100

    in_own_network(body)


def test_too_much_news_are_news() -> None:
    """What the kernel had no room to tell may be what was waited for."""

    def body(network: Network) -> None:
        with PathWatch() as watch:
            assert watch._socket is not None
            watch._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            for _ in range(50):
                network.kernel.link("set", index=network.near, mtu=1400)
                network.kernel.link("set", index=network.near, mtu=1500)
            assert watch.wait(LONG, NEVER)
            calm(watch)
            network.join()
            assert watch.wait(LONG, NEVER)

    in_own_network(body)


class Scripted(PathWatch):
    """One to which the kernel tells what the test says: whether there are news, at each look."""

    def __init__(self, news: Iterable[bool]) -> None:
        super().__init__()
        self._left = iter(news)

    def _news(self, timeout: float) -> bool:
        return next(self._left)


def test_what_follows_on_each_other_is_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scripted([False, True, True, True, False, True]) as watch:
        assert watch.wait(LONG, NEVER)
        assert list(watch._left) == [True]  # the next thing
    monkeypatch.setattr(routes, "_BURST", 0.05)
    with Scripted(itertools.repeat(True)) as watch:
        assert watch.wait(LONG, NEVER)


def test_stop_ends_a_wait() -> None:
    for watch in (PathWatch(), contextlib.nullcontext(PathWatch())):  # the second has no netlink
        stop = threading.Event()
        with watch as entered, later(stop.set):
            before = time.monotonic()
            assert not entered.wait(LONG, stop)
            assert time.monotonic() - before < LONG / 2
            assert not entered.wait(LONG, stop)


def test_without_pyroute2_a_wait_lasts_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(network: Network) -> None:
        with PathWatch() as watch:
            network.join()
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, "pyroute2.netlink.rtnl.marshal", None)
                before = time.monotonic()
                assert not watch.wait(SHORT, NEVER)
                assert time.monotonic() - before >= SHORT

    in_own_network(body)


def test_the_route(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"""\
Host alias
  HostName {FAR}
Host inner
  ProxyJump somebody@gate:2222,alias
Host gate
  HostName 10.79.0.9
Host proxied
  ProxyCommand nc %h %p
"""
    )
    monkeypatch.setenv("BLKTRACK_SSH", f"ssh -F {config}")

    def body(network: Network) -> None:
        network.join()
        network.kernel.route("add", dst="10.79.0.0/16", gateway=FAR)
        network.kernel.route("add", dst="10.80.0.0/16", type="unreachable")
        network.kernel.addr("add", index=network.near, address="fe80::77", prefixlen=64)
        for host, expected in {
            FAR: f"{FAR} dev near0",
            NEAR: f"{NEAR} dev lo",
            "10.79.1.2": f"10.79.1.2 via {FAR} dev near0",
            "10.80.1.2": "no route to 10.80.1.2",
            "192.0.2.1": "no route to 192.0.2.1",
            "[::1]": "::1 dev lo",
            "[fe80::1%25near0]": "fe80::1 dev near0",
            "alias": f"{FAR} dev near0",
            "inner": f"jump host gate: 10.79.0.9 via {FAR} dev near0",
            "proxied": "by a ProxyCommand",
            "no-such-host.invalid": "",
        }.items():
            assert RouteLook(Address.parse(f"ssh://{host}/a")).told() == expected, host

    in_own_network(body)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_ip_no_route_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor with one that knows no JSON, as busybox has it."""
    ip, ssh = tmp_path / "ip", shutil.which("ssh")
    monkeypatch.setenv("BLKTRACK_SSH", f"{ssh} -F none")
    monkeypatch.setenv("PATH", str(tmp_path))
    address = Address.parse("ssh://127.0.0.1/a")
    ip.symlink_to(shutil.which("ip", path=TOOL_PATH) or "no ip")
    assert RouteLook(address).told() == "127.0.0.1 dev lo"
    ip.unlink()
    assert RouteLook(address).told() == ""
    ip.write_text("#!/bin/sh\necho 'ip: unrecognized option: json' >&2\nexit 1\n")
    ip.chmod(0o755)
    assert RouteLook(address).told() == ""


def test_a_route_that_takes_long_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def resolve(*_: Any, **__: Any) -> None:
        ended.wait(LONG)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    before = time.monotonic()
    assert RouteLook(Address.parse("ssh://host/a")).told() == ""
    assert time.monotonic() - before < LONG / 2
    ended.set()
    monkeypatch.setenv("BLKTRACK_SSH", "sh -c 'exec sleep 60'")
    assert RouteLook(Address.parse("ssh://host/a")).told() == ""
    assert time.monotonic() - before < LONG
    monkeypatch.setenv("BLKTRACK_SSH", "'")
    assert RouteLook(Address.parse("ssh://host/a")).told() == ""
