"""What others do to a command that runs: other commands, signals, a reader that is gone."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from blktrack.errors import NotTracked
from blktrack.units import KIB, MIB
from tests.background import TRACEBACK, Running, assert_clear, past_start
from tests.blockdev import TOP, Done, Lab, wait_until
from tests.test_events import SIZE, change, filled, identical

pytestmark = pytest.mark.needs("root", "loop", "bpf")


def test_other_commands_while_a_sync_runs(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, "--limit", "2M", "--json")
    running.until_open(device, replica)
    commands = ("stop", "track", "status", "extents", "start")
    others = {command: Running(shared, command, device) for command in commands}
    for command, other in others.items():
        done = other.end()
        assert done.code == (6 if command == "stop" else 0), done
        if command == "stop":
            assert f"{device}: in use, it is open in" in done.err
    assert running.process.poll() is None, "all of it was while the sync ran"
    change(device, MIB)
    assert running.end().json["mode"] == "initial"
    change(device, 2 * MIB)
    assert shared.sync(device, replica).mode == "incremental"
    assert identical(device, replica)


def test_untrack_while_a_sync_runs(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, "--limit", "4M", "--json")
    running.until_open(device, replica)
    shared.untrack(device)
    change(device, MIB)
    assert_clear(running.end(), 3, f"{device} is no longer tracked")
    assert_clear(shared.blktrack("sync", device, replica), 3, f"blktrack track {device}")
    shared.track(device)
    assert shared.sync(device, replica).mode == "initial"
    assert identical(device, replica)


def test_a_signal_at_any_time(shared: Lab, seed: int) -> None:
    rng = random.Random(seed)
    device, replica, other = filled(shared), shared.name("replica"), shared.loop(SIZE)
    shared.track(device)
    shared.sync(device, replica)
    commands = {
        "track": ["track", other],
        "status": ["status"],
        "extents": ["extents", device],
        "stop": ["stop", device],
        "start": ["start", device],
        "sync": ["sync", device, str(replica)],
        "verify": ["verify", device, str(replica)],
    }
    lasts = {}
    for name, words in commands.items():
        begun = time.monotonic()
        assert shared.blktrack(*words).code == 0, name
        lasts[name] = time.monotonic() - begun
    signals = itertools.cycle((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    ended = {"by the signal": 0, "before it": 0}
    for turn in range(24):
        name = list(commands)[turn % len(commands)]
        if name == "track":
            with contextlib.suppress(NotTracked):
                shared.untrack(other)
        if shared.status(device)["state"] == "tracking":  # not at rest, where it would be a doubt
            change(device, turn % 64 * 128 * KIB, number=turn + 2)
        running = Running(shared, *commands[name])
        wait_until(past_start(running.process), "the start")
        # A wait of no fixed length is the point here: whatever it is doing by then.
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(timeout=rng.uniform(0, lasts[name]))
        number = next(signals)
        running.process.send_signal(number)
        done = running.end()
        assert done.err == "" or done.err.startswith("blktrack: "), (name, number, done)
        # verify finds what was changed just now
        fine = (0, 128 + number, -number, *((5,) if name == "verify" else ()))
        assert done.code in fine, (name, number, done)
        ended["by the signal" if done.code in (128 + number, -number) else "before it"] += 1
    assert ended["by the signal"] > 5, ended
    shared.track(other)
    assert shared.status(other)["state"] == "tracking"
    last = shared.blktrack("sync", device, replica, "--json", "--no-resync").json
    assert last["mode"] in ("incremental", "nothing")
    assert identical(device, replica)


def test_signals_that_are_ignored_stay_so(shared: Lab) -> None:
    """As by nohup, and by a shell for what runs in its background."""
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    deaf = ("env", "--ignore-signal=HUP", "--ignore-signal=INT")
    running = Running(shared, "sync", device, replica, "--limit", "4M", "--quiet", prefix=deaf)
    running.until_open(device, replica)
    running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == Done(0, "", "")
    assert identical(device, replica)


@pytest.mark.parametrize("command", ["status", "extents", "sync", "--help"])
def test_nobody_reads_the_output(shared: Lab, command: str) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    change(device, MIB)
    words = {
        "status": ["status"],
        "extents": ["extents", device],
        "sync": ["sync", device, str(replica)],
        "--help": ["--help"],
    }[command]
    with open("/dev/full", "w", encoding="ascii") as nowhere:
        reader, closed = os.pipe()
        os.close(reader)
        for output, code, says in ((closed, 141, ""), (nowhere.fileno(), 1, "No space left")):
            done = subprocess.run(
                [sys.executable, "-m", "blktrack", *words],
                stdout=output, stderr=subprocess.PIPE, text=True, check=False, cwd=TOP,
            )  # fmt: skip
            assert done.returncode == code, done
            assert says in done.stderr
            assert TRACEBACK not in done.stderr
            assert "Exception" not in done.stderr
        os.close(closed)
    if command == "sync":
        assert shared.sync(device, replica).mode == "nothing"
        assert identical(device, replica)
