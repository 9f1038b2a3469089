"""Death and interruption of `send` and `recv`, and runs that meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blktrack.units import KIB, MIB
from tests.blockdev import TOP, read_image, wait_until
from tests.increments import FILES, ON_THE_WAY
from tests.streams import LINK, Hosts, hosts

__all__ = ["hosts"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop", "bpf")


def test_death_of_the_receiver_at_every_place(hosts: Hosts) -> None:
    """The replica is at its old point or at the new one, once anybody has looked at it."""
    found = {"old": 0, "new": 0}
    for number, place in enumerate([*ON_THE_WAY, *FILES]):
        old = read_image(hosts.target).copy()
        hosts.change(number % 12 * MIB, 256 * KIB, number=number + 2)
        delta, report = hosts.sent()
        died = hosts.recv(delta, env={"BLKTRACK_CRASH": place})
        assert died.code == -signal.SIGKILL, place
        replica = hosts.replica()
        assert replica.state == "ready", replica
        if replica.epoch == report.epoch:
            found["new"] += 1
            assert hosts.identical()
            hosts.commit(report.epoch)
        else:
            found["old"] += 1
            assert (read_image(hosts.target) == old).all()
            assert hosts.received(delta).epoch == report.epoch
            hosts.commit(report.epoch)
    assert all(found.values()), found
    assert hosts.identical()


def test_interrupted_while_it_waits_for_more(hosts: Hosts) -> None:
    hosts.change(MIB, MIB)
    delta, _ = hosts.sent()
    before = hosts.replica()
    staged = Path(f"{hosts.target}.blktrack/incoming.pack")
    running = subprocess.Popen(
        [sys.executable, "-m", "blktrack", "recv", str(hosts.target)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=TOP,
        env={**os.environ, **hosts.there},
    )
    assert running.stdin is not None
    running.stdin.write(delta[:-100])
    running.stdin.flush()
    wait_until(lambda: staged.exists() and staged.stat().st_blocks > 0, "some of it to be staged")
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM
    assert b"receiving was interrupted" in err and b"Traceback" not in err
    assert not staged.exists()
    assert hosts.replica() == before
    hosts.received(delta)
    assert hosts.identical()


def test_a_receiver_that_goes_away(hosts: Hosts) -> None:
    hosts.change(0, 8 * MIB)
    running = subprocess.Popen(
        [sys.executable, "-m", "blktrack", "send", hosts.source, "--link", LINK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TOP,
    )
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    err = running.stderr.read()
    assert running.wait(60) == 1
    running.stderr.close()
    assert "whoever was to take the delta went away" in err and "Traceback" not in err
    assert hosts.carry().mode == "incremental"
    assert hosts.identical()


def test_one_at_a_time(hosts: Hosts) -> None:
    hosts.change(0, 8 * MIB)
    running = subprocess.Popen(
        [sys.executable, "-m", "blktrack", "send", hosts.source, "--link", LINK, "--quiet"],
        stdout=subprocess.PIPE,
        cwd=TOP,
    )
    assert running.stdout is not None
    head = running.stdout.read(100)
    for words in (["--quiet"], ["--commit", "1"]):
        done = hosts.send(*words)[1]
        assert done.code == 6 and f"link {LINK} is held by another run" in done.err
    rest = running.stdout.read()
    assert running.wait(60) == 0
    running.stdout.close()
    hosts.received(head + rest)
    assert hosts.identical()
