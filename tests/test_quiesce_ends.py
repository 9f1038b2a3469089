"""Every way in which a freeze can end: an error, the cap, a signal, the death of its guard."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack.errors import BlktrackError
from blktrack.quiesce import watchdog
from blktrack.quiesce.freeze import Freeze, FreezeExpired
from tests.blockdev import TOP, Lab, told, wait_until
from tests.freezes import (
    KINDS,
    SLACK,
    Load,
    Mounted,
    alive,
    assert_thawed,
    ext4,
    let_go,
    not_entered,
)

__all__ = ["ext4"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop", "ext4")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_of_the_body_thaws(ext4: Mounted, error: type[BaseException]) -> None:
    with pytest.raises(error), ext4.freeze():
        raise error
    assert_thawed(ext4)


def expired(freeze: Freeze) -> bool:
    try:
        freeze.check()
    except FreezeExpired:
        return True
    return False


def test_the_cap(ext4: Mounted) -> None:
    with (
        Load(ext4.point) as load,
        pytest.raises(FreezeExpired, match=r"0\.4 s") as caught,
        ext4.freeze(cap=0.4) as freeze,
    ):
        freeze.check()
        load.goes_on()
        wait_until(functools.partial(expired, freeze), "word of it")
    assert caught.value.exit_code == 4 and caught.value.hint
    assert 0.4 <= freeze.seconds < 0.4 + SLACK
    told(f"freeze with a cap of 400 ms: ended after {1000 * freeze.seconds:.1f} ms")
    assert_thawed(ext4)


def test_the_error_of_the_body_goes_before_the_cap(ext4: Mounted) -> None:
    with pytest.raises(RuntimeError), ext4.freeze(cap=0.1):
        wait_until(lambda: (ext4.point / "file").write_bytes(b"x") == 1, "a write")
        raise RuntimeError


def test_somebody_else_thaws(ext4: Mounted) -> None:
    with pytest.raises(FreezeExpired, match="somebody else thawed it"), ext4.freeze():
        let_go(ext4.point)
    assert_thawed(ext4)


CHILD = """
import functools, sys, time
from blktrack.quiesce.find import file_systems
from blktrack.quiesce.freeze import Freeze
from blktrack.sysfs import BlockDevice
device = BlockDevice.find(sys.argv[1])
while True:
    with Freeze(device, functools.partial(file_systems, device), cap=float(sys.argv[2])):
        print("frozen", flush=True)
        time.sleep(float(sys.argv[3]))
"""


@contextlib.contextmanager
def freezing(
    mounted: Mounted, cap: float, hold: float, script: str = CHILD
) -> Iterator[subprocess.Popen[str]]:
    """Another process that freezes again and again; it has frozen at least once."""
    words = [sys.executable, "-c", script, mounted.path, str(cap), str(hold)]
    process = subprocess.Popen(
        words,
        cwd=TOP,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "frozen\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_thaws(lab: Lab, kind: str, number: signal.Signals) -> None:
    mounted = Mounted(lab, kind)
    with Load(mounted.point) as load, freezing(mounted, 60, 60) as process:
        os.killpg(process.pid, number)
        began = time.monotonic()
        load.goes_on()
        took = time.monotonic() - began
        assert took < SLACK
        process.wait(10)
    told(f"{kind} thawed {1000 * took:.1f} ms after {number.name} to who froze it")
    assert_thawed(mounted)


def test_a_stopped_process_thaws_at_the_cap(ext4: Mounted) -> None:
    with Load(ext4.point) as load, freezing(ext4, 0.5, 60) as process:
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        load.goes_on()
        assert time.monotonic() - began < 0.5 + SLACK


STOPPING = f"""
import os, signal
from blktrack.quiesce.watchdog import Watchdog
tell, told = Watchdog._tell, []
def stop(self, word, index):
    told.append(word)
    if told.count(b"f") == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    tell(self, word, index)
Watchdog._tell = stop
{CHILD}"""


def test_a_process_stopped_before_it_can_say_that_it_froze(ext4: Mounted) -> None:
    with Load(ext4.point) as load, freezing(ext4, 0.5, 0, STOPPING) as process:
        wait_until(lambda: is_stopped(process.pid), "the second freeze")
        began = time.monotonic()
        load.goes_on()
        assert time.monotonic() - began < 0.5 + SLACK
    assert_thawed(ext4)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_death_at_any_moment_thaws(ext4: Mounted) -> None:
    with Load(ext4.point) as load:
        for turn in range(12):
            with freezing(ext4, 60, 0) as process:
                time.sleep(turn * 0.012)
            assert process.returncode == -signal.SIGKILL
            began = time.monotonic()
            load.goes_on()
            assert time.monotonic() - began < SLACK
    assert_thawed(ext4)


CAREFUL = f"""
try:
{textwrap.indent(CHILD, "    ")}
except KeyboardInterrupt:
    time.sleep(600)
"""


def childless(pid: int) -> bool:
    """But for those that have ended and were not waited for."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return not any(alive(int(child)) for child in children)


def test_an_interrupt_at_any_moment_thaws(ext4: Mounted) -> None:
    with Load(ext4.point) as load:
        for turn in range(12):
            with freezing(ext4, 60, 0, CAREFUL) as process:
                time.sleep(turn * 0.012)
                process.send_signal(signal.SIGINT)
                load.goes_on()
                wait_until(functools.partial(childless, process.pid), "the end of the guard")
                assert process.poll() is None
                assert_thawed(ext4)


def guard_of(freeze: Freeze) -> int:
    assert freeze._watchdog and freeze._watchdog._process
    return freeze._watchdog._process.pid


def test_the_guard_is_killed(ext4: Mounted) -> None:
    with (
        Load(ext4.point) as load,
        pytest.raises(FreezeExpired, match="guards it was killed"),
        ext4.freeze(cap=60) as freeze,
    ):
        os.kill(guard_of(freeze), signal.SIGKILL)
        load.goes_on()
    assert freeze.seconds < SLACK
    assert_thawed(ext4)


def test_the_guard_is_killed_at_the_end(ext4: Mounted) -> None:
    for _ in range(10):
        with pytest.raises(FreezeExpired), ext4.freeze(cap=60) as freeze:
            os.kill(guard_of(freeze), signal.SIGKILL)
        assert_thawed(ext4)


def test_the_guard_is_killed_at_any_moment(ext4: Mounted) -> None:
    ended = []
    with Load(ext4.point):
        for turn in range(20):
            freeze = ext4.freeze(cap=60)
            killer = threading.Thread(target=kill_guard, args=[freeze, turn * 0.015])
            killer.start()
            try:
                with freeze:
                    time.sleep(0.02)
                ended.append("held")
            except BlktrackError as error:
                ended.append("lost" if isinstance(error, FreezeExpired) else "not begun")
            killer.join()
            assert_thawed(ext4)
    assert "lost" in ended
    ways = ", ".join(f"{ended.count(way)} {way}" for way in sorted(set(ended)))
    told(f"freezes whose guard was killed at some moment: {ways}")


def kill_guard(freeze: Freeze, delay: float) -> None:
    wait_until(lambda: bool(freeze._watchdog and freeze._watchdog._process), "a guard")
    time.sleep(delay)
    assert freeze._watchdog and freeze._watchdog._process
    freeze._watchdog._process.kill()


def test_the_guard_is_stopped(ext4: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FreezeExpired), ext4.freeze() as freeze:
        monkeypatch.setattr(watchdog, "_PATIENCE", 0.3)
        os.kill(guard_of(freeze), signal.SIGSTOP)
    assert_thawed(ext4)


def test_the_guard_cannot_be_asked_to_end(ext4: Mounted) -> None:
    with ext4.freeze() as freeze:
        guard = guard_of(freeze)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(guard, number)
        assert os.getsid(guard) == guard
        locked = Path(f"/proc/{guard}/status").read_text()
        assert "VmLck:\t       0 kB" not in locked
        freeze.check()
    assert_thawed(ext4)


def test_the_guard_does_not_start(ext4: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_PROGRAM", Path("/nowhere"))
    not_entered(ext4.freeze(), BlktrackError, "did not start")
    assert_thawed(ext4)
