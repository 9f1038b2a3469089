"""What the command line says before and after its work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from blktrack.units import MIB
from tests.background import assert_clear
from tests.bench import DEVICE_STATE, lock_of, locked
from tests.blockdev import TOP, Lab, run, wait_until
from tests.test_events import filled

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 4 * MIB


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sync", "/dev/a", "/b", "--limit", "0"), "'0' is less than 1 byte"),
        (("--",), "a command is missing"),
        (("sync", "/dev/a", ""), "TARGET: it is empty; name a device or a file"),
        (("track", "DEVICE", "--granularity", "128M"), "granularity 128 MiB is more than 64 MiB"),
    ],
)
def test_wrong_words(shared: Lab, words: tuple[str, ...], says: str) -> None:
    device = shared.loop(SIZE)
    done = shared.blktrack(*(device if word == "DEVICE" else word for word in words))
    assert (done.code, done.out) == (2, "")
    assert says in done.err and "\n  -> " in done.err


def test_interrupted_where_python_takes_the_signal(shared: Lab) -> None:
    """As in a program that calls main()."""
    device = filled(shared, SIZE)
    shared.track(device)
    held = lock_of(shared.store, device)
    code = "import sys; from blktrack.cli import main; sys.exit(main())"
    with locked(held):
        running = subprocess.Popen(
            [sys.executable, "-c", code, "status", device],
            stderr=subprocess.PIPE,
            text=True,
            cwd=TOP,
        )
        links = f"/proc/{running.pid}/fd"

        def waits() -> bool:
            for fd in os.listdir(links):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    if os.readlink(f"{links}/{fd}") == str(held):
                        return True
            return False

        wait_until(waits, "the wait for the lock")
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "blktrack: interrupted\n")


@pytest.mark.needs("ext4")
def test_a_source_that_holds_our_state(lab: Lab) -> None:
    device = lab.loop(64 * MIB)
    run("mkfs.ext4", "-q", device)
    with lab.mounted(device) as point:
        env = {"BLKTRACK_ROOT": str(point / "root")}
        try:
            (point / "root/var/lib/blktrack").mkdir(parents=True)
            done = lab.blktrack("track", device, env=env)
            assert done.code == 0
            assert f"lies on {device}: each sync makes changes of its own" in done.err
            assert lab.blktrack("track", device, "--quiet", env=env).err == ""
            assert lab.blktrack("untrack", device, env=env).code == 0
            # A device of the policy is tracked as needed.
            state = next((point / "root/var/lib/blktrack/devices").iterdir())
            shutil.rmtree(state)
            policy = point / "root/etc/blktrack/blktrack.toml"
            policy.parent.mkdir(parents=True)
            target = lab.name("replica")
            policy.write_text(f'[device.a]\npath = "{device}"\nreplica.b.target = "{target}"\n')
            done = lab.blktrack("sync", "--all", env=env)
            assert f"lies on {device}: each sync makes changes of its own" in done.err
        finally:
            lab.blktrack("untrack", device, env=env)
            pins = lab.store.paths.below(point / "root").pins
            subprocess.run(["rm", "-rf", pins], check=True)


def test_state_of_a_newer_version(lab: Lab) -> None:
    state = lab.folder / "root" / DEVICE_STATE
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"format": 99}), encoding="utf-8")
    done = lab.blktrack("status")
    assert_clear(done, 1, f"{state} has format 99, this version writes 1", "newer blktrack")
    assert json.loads(state.read_text(encoding="utf-8")) == {"format": 99}


def test_a_tool_of_systemd_that_fails(shared: Lab) -> None:
    shared.track(shared.loop(SIZE))
    tools = shared.name("tools")
    tools.mkdir()
    (tools / "systemd-escape").write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    (tools / "systemd-escape").chmod(0o755)
    done = shared.blktrack("service", "show", env={"PATH": f"{tools}:{os.environ['PATH']}"})
    assert_clear(done, 1, "systemd-escape --path --suffix failed: it is broken")
