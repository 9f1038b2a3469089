"""What the outside may rely on: which commands end with which codes, and what goes where.

TABLE has a row for every command and a mark for every code that it may end with; each mark is a
case that really ends that way. What the reports hold is in test_contract_json.py.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from blktrack.cli import COMMANDS
from blktrack.options import Options
from blktrack.state import Store
from blktrack.units import KIB, MIB
from tests.background import TRACEBACK, Running, past_start
from tests.blockdev import Done, Lab, wait_until
from tests.streams import LINK, Hosts
from tests.test_events import change, filled
from tests.test_oracle import repeating

pytestmark = pytest.mark.needs("root", "loop", "bpf")

# 0 done, 1 failed, 2 wrong usage, 3 resync needed or not tracked, 4 no consistent point,
# 5 different, 6 busy, 128+N stopped by signal N.
TABLE = """
          0  1  2  3  4  5  6  128+
doctor    x  x  x  .  .  .  .  x
track     x  x  x  .  .  .  x  x
untrack   x  x  x  x  .  .  x  x
status    x  x  x  x  .  .  x  x
extents   x  x  x  x  .  .  x  x
sync      x  x  x  x  x  .  x  x
send      x  x  x  x  x  .  x  x
recv      x  x  x  .  .  .  x  x
verify    x  x  x  x  x  x  x  x
start     x  x  x  x  .  .  x  x
stop      x  x  x  x  .  .  x  x
service   x  x  x  .  .  .  .  x
"""
HOOK_FAILS = ("--consistency", "filesystem", "--pre-freeze", "false")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIZE = 4 * MIB
DEVICE_STATE = "var/lib/blktrack/devices/x/device.json"  # below BLKTRACK_ROOT

# A command line per mark: DEVICE and the like stand for what Bench has. No two need an order.
WORDS = {
    ("doctor", 0): "doctor",
    ("doctor", 2): "doctor DEVICE",
    ("track", 0): "track DEVICE",
    ("track", 1): "track DEVICE --granularity 64K",
    ("track", 2): "track DEVICE --granularity 3000",
    ("untrack", 2): "untrack",
    ("untrack", 3): "untrack PLAIN",
    ("status", 0): "status DEVICE",
    ("status", 2): "status DEVICE PLAIN",
    ("status", 3): "status PLAIN",
    ("extents", 0): "extents DEVICE",
    ("extents", 1): "extents EMPTY",
    ("extents", 2): "extents DEVICE --target nowhere",
    ("extents", 3): "extents PLAIN",
    ("sync", 0): "sync DEVICE REPLICA",
    ("sync", 1): "sync DEVICE DEVICE",
    ("sync", 2): "sync DEVICE REPLICA --limit fast",
    ("sync", 3): "sync PLAIN REPLICA",
    ("sync", 4): f"sync DEVICE REPLICA {' '.join(HOOK_FAILS)}",
    ("sync", 6): "sync DEVICE TAKEN",
    ("send", 0): f"send DEVICE --link {LINK}",
    ("send", 1): f"send DEVICE --link {LINK} --commit 1000000",
    ("send", 2): "send DEVICE --link none --commit 1",
    ("send", 3): f"send PLAIN --link {LINK}",
    ("send", 4): f"send DEVICE --link {LINK} {' '.join(HOOK_FAILS)}",
    ("recv", 2): "recv",
    ("verify", 0): "verify DEVICE REPLICA",
    ("verify", 1): "verify DEVICE /nowhere/replica",
    ("verify", 2): "verify DEVICE ssh://host/replica",
    ("verify", 3): "verify PLAIN REPLICA --repair",
    ("verify", 5): "verify DEVICE STALE",
    ("verify", 6): "verify DEVICE TAKEN",
    ("start", 0): "start DEVICE",
    ("start", 2): "start --all",
    ("start", 3): "start PLAIN",
    ("stop", 2): "stop --all",
    ("stop", 3): "stop PLAIN",
    ("service", 0): "service show",
    ("service", 2): "service begin",
}
# These wait for the lock of a device, half a minute, before they say that it is held.
WAITING = {
    "track": "track HELD",
    "untrack": "untrack HELD",
    "status": "status HELD",
    "extents": "extents HELD",
    "start": "start HELD",
    "stop": "stop HELD",
}


@dataclass
class Bench:
    """Devices in the states that the cases are of."""

    lab: Lab
    hosts: Hosts  # DEVICE is its source
    named: dict[str, str]
    waiting: dict[str, Running] = field(default_factory=dict)

    def words(self, line: str) -> list[str]:
        return [self.named.get(word, word) for word in line.split()]

    def run(self, line: str, **env: str) -> Done:
        return self.lab.blktrack(*self.words(line), env=env)

    def waited(self, name: str) -> Done:
        return self.waiting[name].end()

    def begin(self, line: str, stdin: int | None = None, **env: str) -> Running:
        return Running(self.lab, *self.words(line), env=env, stdin=stdin)


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


@pytest.fixture(scope="module")
def bench(attached: Lab) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLKTRACK_ROOT", str(attached.folder / "root"))
        with attached.fresh() as lab, contextlib.ExitStack() as locks:
            hosts = Hosts(lab, SIZE)
            hosts.carry()
            held, empty = filled(lab, SIZE), lab.own_loop(SIZE, lab.name("disk"))
            lab.track(held)
            replica, taken, stale = (lab.name("replica") for _ in range(3))
            for target in (replica, taken):
                lab.sync(hosts.source, target)
            stale.write_bytes(bytes(SIZE))
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
                },
            )
            locks.enter_context(locked(lock_of(lab.store, held)))
            locks.enter_context(locked(taken))
            made.waiting = {name: made.begin(line) for name, line in WAITING.items()}
            yield made


Case = Callable[[Bench], Done]
CASES: dict[tuple[str, int], Case] = {
    **{key: partial(Bench.run, line=line) for key, line in WORDS.items()},
    **{(name, 6): partial(Bench.waited, name=name) for name in WAITING},
}


def case(command: str, code: int) -> Callable[[Case], Case]:
    def keep(work: Case) -> Case:
        CASES[command, code] = work
        return work

    return keep


@case("doctor", 1)
def _(bench: Bench) -> Done:
    """Not root, for one."""
    running = Running(bench.lab, "doctor", prefix=("setpriv", "--reuid=65534", "--clear-groups"))
    return running.end()


@case("untrack", 0)
def _(bench: Bench) -> Done:
    device = filled(bench.lab, SIZE)
    bench.lab.track(device)
    return bench.run(f"untrack {device}")


def damaged(command: str) -> Case:
    """State that cannot be read, of a device that went away."""

    def work(bench: Bench) -> Done:
        root = bench.lab.name("root")
        state = root / DEVICE_STATE
        state.parent.mkdir(parents=True)
        state.write_text("{", encoding="utf-8")
        return bench.run(command, BLKTRACK_ROOT=str(root))

    return work


for name in ("untrack", "status", "stop", "start"):
    CASES[name, 1] = damaged(f"{name} {'/dev/away' if name != 'status' else ''}")


@case("stop", 0)
def _(bench: Bench) -> Done:
    device = filled(bench.lab, SIZE)
    bench.lab.track(device)
    return bench.run(f"stop {device}")


@case("stop", 6)
def _(bench: Bench) -> Done:
    with open(bench.hosts.source, "rb"):
        done = bench.run("stop DEVICE")
    waited = bench.waiting["stop"].end()
    assert (waited.code, waited.out) == (6, ""), "also where another run holds it"
    assert "is held by another run" in waited.err
    return done


@case("send", 6)
def _(bench: Bench) -> Done:
    store, device = bench.lab.store, state_of(bench.lab.store, bench.hosts.source)
    (link,) = [link for link in store.links(device) if link.name == LINK]
    with locked(store.link_lock(device, link.id)):
        return bench.run(f"send DEVICE --link {LINK}")


@case("verify", 4)
def _(bench: Bench) -> Done:
    """No point is to be had while all of it is written over and over, and nothing can be frozen."""
    device, replica = filled(bench.lab, SIZE), bench.lab.name("replica")
    bench.lab.track(device)
    bench.lab.sync(device, replica)

    def rewrite() -> None:
        for offset in range(0, SIZE, 256 * KIB):
            change(device, offset, 256 * KIB)

    with repeating(rewrite):
        return bench.run(f"verify {device} {replica} --repair")


def received(bench: Bench, delta: bytes, target: str, *words: str) -> Done:
    file = bench.lab.name("delta")
    file.write_bytes(delta)
    with file.open("rb") as stdin:
        line = f"recv {target} {' '.join(words)}"
        return bench.begin(line, stdin=stdin.fileno(), **bench.hosts.there).end()


CASES["recv", 0] = lambda bench: received(bench, bench.hosts.sent()[0], str(bench.hosts.target))
CASES["recv", 1] = lambda bench: received(bench, b"no delta" * 100, str(bench.hosts.target))
CASES["recv", 6] = lambda bench: received(bench, bench.hosts.sent()[0], "TAKEN")


@case("service", 1)
def _(bench: Bench) -> Done:
    """A host that does not use systemd."""
    return bench.run("service show", PATH="/nowhere")


def rows() -> dict[str, dict[str, bool]]:
    head, *lines = (line.split() for line in TABLE.strip().splitlines())
    return {
        line[0]: dict(zip(head, (mark == "x" for mark in line[1:]), strict=True)) for line in lines
    }


def marks() -> list[tuple[str, int]]:
    """Code by code, so that those which wait come last."""
    found = [
        (command, int(code))
        for command, row in rows().items()
        for code, marked in row.items()
        if marked and code.isdigit()
    ]
    return sorted(found, key=lambda mark: mark[1] == 6)


def test_every_command_has_a_row_and_every_mark_a_case() -> None:
    assert set(rows()) == set(COMMANDS)
    assert set(marks()) == set(CASES)
    assert {command for command, row in rows().items() if row["128+"]} == set(ON_THE_WAY)


@pytest.mark.parametrize(("command", "code"), marks(), ids=str)
def test_codes(bench: Bench, command: str, code: int) -> None:
    done = CASES[command, code](bench)
    assert done.code == code, done
    assert TRACEBACK not in done.err
    if code == 0:
        assert done.err.count("\n") <= (2 if command == "send" else 0), "progress or a warning"
    elif (command, code) not in (("doctor", 1), ("verify", 5)):  # which report
        assert command == "send" or done.out == ""  # a delta without an end is none
        by_parser = code == 2 and done.err.startswith("usage: ")
        *_, sentence, hint = ["", *done.err.strip().splitlines()]
        if by_parser:
            assert re.match(f"blktrack( {command})?: error: ", hint), done.err
        else:
            assert sentence.startswith("blktrack: ") and hint.startswith("  -> "), done.err


Start = Callable[[Bench, contextlib.ExitStack], Running]


def on_the_way(line: str, *opens: str) -> Start:
    """It has this open, and is slow."""

    def begin(bench: Bench, _: contextlib.ExitStack) -> Running:
        running = bench.begin(line.replace("NEW", str(bench.lab.name("replica"))))
        running.until_open(*(bench.named[name] for name in opens))
        return running

    return begin


def waits(line: str) -> Start:
    """For the lock of a device."""

    def begin(bench: Bench, _: contextlib.ExitStack) -> Running:
        running = bench.begin(line)
        running.until_open(lock_of(bench.lab.store, bench.named["HELD"]))
        return running

    return begin


def doctor_on_the_way(bench: Bench, _: contextlib.ExitStack) -> Running:
    running = bench.begin("doctor")
    wait_until(past_start(running.process), "the start")
    return running


def recv_on_the_way(bench: Bench, stack: contextlib.ExitStack) -> Running:
    """Its sender has sent a part, and is stuck."""
    delta, _ = bench.hosts.sent(Options(full=True))
    target = bench.lab.name("replica")
    reader, writer = os.pipe()
    stdin, file = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
    stack.callback(file.close)
    with stdin:
        running = bench.begin(f"recv {target}", stdin=reader, **bench.hosts.there)
    thread = threading.Thread(target=file.write, args=(delta[: SIZE // 2],))
    thread.start()
    running.until_open(target)
    thread.join()
    return running


def service_on_the_way(bench: Bench, stack: contextlib.ExitStack) -> Running:
    """Its state is slow to be read: a pipe that has nothing in it."""
    root = bench.lab.name("root")
    state = root / DEVICE_STATE
    state.parent.mkdir(parents=True)
    os.mkfifo(state)
    running = bench.begin("service show", BLKTRACK_ROOT=str(root))
    found: list[int] = []

    def has_come() -> bool:
        with contextlib.suppress(OSError):  # nobody reads it
            found.append(os.open(state, os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    wait_until(has_come, "the reading of the state")
    stack.callback(os.close, found[0])
    return running


ON_THE_WAY: dict[str, Start] = {
    "doctor": doctor_on_the_way,
    "recv": recv_on_the_way,
    "service": service_on_the_way,
    "sync": on_the_way("sync DEVICE NEW --limit 256K", "DEVICE"),
    "send": on_the_way(f"send DEVICE --link {LINK} --full --limit 256K", "DEVICE"),
    "verify": on_the_way("verify DEVICE REPLICA --limit 256K", "DEVICE", "REPLICA"),
    **{name: waits(line) for name, line in WAITING.items()},
}
TELLS = {"sync", "send", "recv", "verify"}  # what there is to tell of what was done so far


@pytest.mark.parametrize("command", ON_THE_WAY)
def test_codes_of_signals(bench: Bench, command: str) -> None:
    for number in SIGNALS:
        with contextlib.ExitStack() as stack:
            running = ON_THE_WAY[command](bench, stack)
            running.process.send_signal(number)
            done = running.end()
        # A shell shows a death by a signal as 128+N too.
        assert done.code == (128 + number if command in TELLS else -number), done
        assert TRACEBACK not in done.err
        assert ("interrupted" in done.err) == (command in TELLS), done.err
    assert bench.lab.status(bench.hosts.source)["state"] == "tracking"


def options_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"blktrack.cli.{command}").arguments(parser)
    return {word for action in parser._actions for word in action.option_strings}


CONTROL = re.compile(r"[^\n\x20-\x7e\u00a0-\uffff]")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_goes_where(bench: Bench, command: str) -> None:
    """The result on standard output, only errors on standard error, and no control characters;
    nothing at all with --quiet, one object with --json."""
    known = options_of(command)
    for how in ("", "--quiet", "--json"):
        if how and how not in known:
            continue
        done = well(bench, command, how)
        assert done.code == 0, done
        result, other = (done.err, done.out) if command == "send" else (done.out, done.err)
        assert not CONTROL.search(result), result
        assert command == "send" or other == ""
        if how == "--json":
            assert result.count("\n") == 1 and isinstance(json.loads(result), dict)
        else:
            assert bool(result) == (how == ""), result


def well(bench: Bench, command: str, how: str) -> Done:
    """A run of a command in which all is well."""
    match command:
        case "recv":
            return received(bench, bench.hosts.sent()[0], str(bench.hosts.target), how)
        case "untrack" | "stop":
            device = filled(bench.lab, SIZE)
            bench.lab.track(device)
            return bench.run(f"{command} {device} {how}")
    return bench.run(f"{WORDS[command, 0]} {how}")
