"""What several commands share: arguments, JSON, texts, signals."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from blktrack.config import Paths
from blktrack.errors import Interrupted, UsageError
from blktrack.rates import UNLIMITED, Rates
from blktrack.ship.address import Address, is_remote
from blktrack.state import Store
from blktrack.units import parse_size

if TYPE_CHECKING:
    from blktrack.options import Options
    from blktrack.report import Report


def paths() -> Paths:
    return Paths.from_environment()


def store() -> Store:
    return Store(paths())


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def size(text: str) -> int:
    """argparse type: a size or a rate, at least 1 byte."""
    try:
        value = parse_size(text.removesuffix("/s"))
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error}; {error.hint}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1 byte")
    return value


def rates(text: str) -> Rates:
    """argparse type: bytes per second, or `none`."""
    return UNLIMITED if text == "none" else Rates(size(text))


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit",
        type=rates,
        metavar="RATE",
        help="bytes read per second, or sent to another host, as 50M, or none",
    )


def replica(text: str) -> str:
    """argparse type: a TARGET in that form, or the name of a link as it is."""
    return target(text) if is_remote(text) else text


def target(text: str) -> str:
    """argparse type: a TARGET in the form in which links remember it."""
    if is_remote(text):
        try:
            return str(Address.parse(text))
        except UsageError as error:
            raise argparse.ArgumentTypeError(f"{error}; {error.hint}") from error
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a device or a file")
    return os.path.abspath(text)


def renew_unit() -> None:
    """Let an installed service unit know what is tracked now."""
    from blktrack import systemd
    from blktrack.tracker.tracker import wanted_devices

    if not os.environ.get("BLKTRACK_ROOT") and systemd.is_installed():  # instances have no unit
        systemd.install(wanted_devices(store()))


def emit(report: Report) -> None:
    json.dump(report.as_json(), sys.stdout)
    sys.stdout.write("\n")
    sys.stdout.flush()


def instant(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@contextlib.contextmanager
def stoppable(options: Options) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the copy after what is in flight; a second one at once."""

    def on_signal(number: int, _: FrameType | None) -> None:
        if options.stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        options.signum = number
        options.stop.set()

    with _on_signals(on_signal):
        yield


@contextlib.contextmanager
def interruptible(doing: str, kept: str) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted where the main thread is, which may be waiting
    for input; the same once more ends the process."""

    def on_signal(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(f"{doing} was interrupted", signum=number, hint=kept)

    with _on_signals(on_signal):
        yield


@contextlib.contextmanager
def deferring(doing: str, kept: str) -> Iterator[Callable[[], None]]:
    """SIGINT, SIGTERM and SIGHUP wait until the function that this gives is called, which then
    raises Interrupted; the same once more ends the process."""
    came: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        came.append(number)

    def stop() -> None:
        if came:
            raise Interrupted(f"{doing} was interrupted", signum=came[0], hint=kept)

    with _on_signals(on_signal):
        yield stop
        stop()


@contextlib.contextmanager
def _on_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """One that is ignored, as by nohup, stays so."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    caught = [number for number in watched if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
