"""A tracked device, a replica and what else commands meet, once for all tests of their contract."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blktrack.state import Store
from blktrack.units import MIB
from tests.background import Running
from tests.blockdev import Done, Lab, lab_in_memory
from tests.streams import Hosts
from tests.test_events import filled

SIZE = 4 * MIB
DEVICE_STATE = "var/lib/blktrack/devices/x/device.json"  # below BLKTRACK_ROOT
# These wait for the lock of a device, half a minute, before they say that it is held.
WAITING = {
    "track": "track HELD",
    "untrack": "untrack HELD",
    "status": "status HELD",
    "extents": "extents HELD",
    "start": "start HELD",
    "stop": "stop HELD",
}
SILENT = {"top"}  # a signal is the usual way to end it
TELLS = {"sync", "send", "recv", "verify"}  # when a signal ends them, what was done so far


@dataclass
class Bench:
    """Devices in the states that the cases are of."""

    lab: Lab
    hosts: Hosts  # DEVICE is its source
    named: dict[str, str]
    waiting: dict[str, Running] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"BLKTRACK_ROOT": str(self.lab.store.paths.lib.parents[2])}

    def words(self, line: str) -> list[str]:
        return [self.named.get(word, word) for word in line.split()]

    def run(self, line: str, **env: str) -> Done:
        return self.lab.blktrack(*self.words(line), env=self.environment | env)

    def waited(self, name: str) -> Done:
        return self.waiting[name].end()

    def begin(
        self,
        line: str,
        env: dict[str, str] | None = None,
        stdin: int | None = None,
        stdout: int = subprocess.PIPE,
    ) -> Running:
        """In the background."""
        env = self.environment | (env or {})
        return Running(self.lab, *self.words(line), env=env, stdin=stdin, stdout=stdout)


@contextlib.contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """As another run has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def lock_of(store: Store, device: str) -> Path:
    return store.run(state_of(store, device)) / "lock"


def state_of(store: Store, device: str) -> str:
    (found,) = [state.id for state in store.devices() if state.path == device]
    return found


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """In an instance of its own: one of its devices is held for good."""
    with (
        pytest.MonkeyPatch.context() as patch,
        lab_in_memory(patch.setenv) as lab,
        contextlib.ExitStack() as locks,
    ):
        hosts = Hosts(lab, SIZE)
        hosts.carry()
        held, empty = filled(lab, SIZE), lab.own_loop(SIZE, lab.name("disk"))
        lab.track(held)
        replica, taken, stale = (lab.name("replica") for _ in range(3))
        for target in (replica, taken):
            lab.sync(hosts.source, target)
        stale.write_bytes(bytes(SIZE))
        # By a name below /dev that stays, as far as anybody can see: a link in /dev/shm.
        policy, stable = lab.name("policy"), lab.name("by-name")
        stable.symlink_to(hosts.source)
        link = f'[device.one.replica.near]\ntarget = "{lab.name("replica")}"\n'
        policy.write_text(f'[device.one]\npath = "{stable}"\n{link}', encoding="utf-8")
        subprocess.run(["losetup", "--detach", empty], check=True)
        made = Bench(
            lab,
            hosts,
            {
                "DEVICE": hosts.source,
                "PLAIN": filled(lab, SIZE),
                "HELD": held,
                "EMPTY": empty,
                "REPLICA": str(replica),
                "TAKEN": str(taken),
                "STALE": str(stale),
                "POLICY": str(policy),
            },
        )
        locks.enter_context(locked(lock_of(lab.store, held)))
        locks.enter_context(locked(taken))
        made.waiting = {name: made.begin(line) for name, line in WAITING.items()}
        yield made


def received(bench: Bench, delta: bytes, target: str, *words: str) -> Done:
    file = bench.lab.name("delta")
    file.write_bytes(delta)
    with file.open("rb") as stdin:
        line = f"recv {target} {' '.join(words)}"
        return bench.begin(line, bench.hosts.there, stdin.fileno()).end()


def beside_progress(err: str) -> str:
    """What else there is on standard error: a slow machine shows progress of anything."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not line.endswith(" so far\n"))


def carried(bench: Bench, *words: str) -> Done:
    """What is received of a delta, which is then committed."""
    delta, report = bench.hosts.sent()
    done = received(bench, delta, str(bench.hosts.target), *words)
    bench.hosts.commit(report.epoch)
    return done
