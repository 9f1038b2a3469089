"""The process of one link, whatever ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from blktrack.fleet.child import Child, Message, Sender
from tests.blockdev import wait_until
from tests.fleets import is_alive

Ready = Callable[[], None]


def all_of(child: Child) -> tuple[list[Message], int]:
    messages: list[Message] = []
    more = True
    while more:
        found, more = child.read()
        messages += found
    return messages, child.reap()


def test_all_it_says_arrives_in_order() -> None:
    """Also what is larger than a pipe holds."""

    def work(sender: Sender, ready: Ready) -> None:
        sender.phase("initial", 10)
        for number in range(3000):
            sender.warn(f"{number} {'x' * 100}")

    messages, code = all_of(Child.begin(work))
    assert code == 0
    assert messages[0] == {"kind": "phase", "name": "initial", "total": 10}
    assert [int(m["message"].split()[0]) for m in messages[1:]] == list(range(3000))


def test_progress_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that is stopped must not hold up a copy, nor the freeze that it is under."""
    monkeypatch.setattr("blktrack.fleet.child._EVERY", 0.0)

    def work(sender: Sender, ready: Ready) -> None:
        for number in range(20_000):
            sender.done(number)

    child = Child.begin(work)
    wait_until(lambda: not is_alive(child.pid), "the end of a child that nobody listens to")
    messages, code = all_of(child)
    assert code == 0
    counts = [message["count"] for message in messages]
    assert counts == sorted(counts) and 0 < len(counts) < 20_000


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), -signal.SIGSEGV),
        (lambda: os._exit(7), 7),
        (lambda: 1 / 0, 1),
    ],
)
def test_how_it_ended(end: Callable[[], None], code: int) -> None:
    def work(sender: Sender, ready: Ready) -> None:
        sender.warn("last words")
        end()

    messages, ended = all_of(Child.begin(work))
    assert ended == code
    assert messages == [{"kind": "warn", "message": "last words"}]


def test_signals_are_held_back_until_it_is_ready() -> None:
    """None comes too early to be caught, and none is lost."""
    caught: list[int] = []

    def work(sender: Sender, ready: Ready) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
        sender.send(kind="before", caught=len(caught))
        ready()
        sender.send(kind="after", caught=caught)

    messages, code = all_of(Child.begin(work))
    assert (code, messages) == (
        0,
        [{"kind": "before", "caught": 0}, {"kind": "after", "caught": [signal.SIGTERM]}],
    )
    assert not {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_it_holds_nothing_of_its_parent() -> None:
    read, write = os.pipe()

    def work(sender: Sender, ready: Ready) -> None:
        opened = [int(name) for name in os.listdir("/proc/self/fd")]
        sender.send(
            kind="fds", opened=[fd for fd in opened if os.path.exists(f"/proc/self/fd/{fd}")]
        )

    first = Child.begin(work)
    second = Child.begin(work)
    try:
        for child in (first, second):
            ((message,), code) = all_of(child)
            assert code == 0
            assert len([fd for fd in message["opened"] if fd > 2]) == 1, "only its own pipe"
    finally:
        os.close(read)
        os.close(write)
