"""What the outside may rely on: which commands end with which codes, and what goes where.

TABLE has a row for every command and a mark for every code that it may end with; each mark is a
case that really ends that way. Signals are in test_contract_signals.py, what reports hold is in
test_contract_json.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from blktrack.cli import COMMANDS, parsers
from blktrack.units import KIB
from tests.background import TRACEBACK, Running
from tests.bench import (
    DEVICE_STATE,
    SILENT,
    SIZE,
    TELLS,
    WAITING,
    Bench,
    beside_progress,
    carried,
    locked,
    received,
    state_of,
)
from tests.blockdev import Done
from tests.oracle import repeating
from tests.streams import LINK
from tests.test_events import change, filled

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
top       x  x  x  x  .  .  .  x
history   x  x  x  x  .  .  .  .
metrics   x  x  x  .  .  .  x  .
config    x  x  x  .  .  .  .  x
service   x  x  x  .  .  .  .  x
install   x  x  x  .  .  .  .  x
completion x x  x  .  .  .  .  .
help      x  x  x  .  .  .  .  .
"""
HOOK_FAILS = ("--consistency", "filesystem", "--pre-freeze", "false")

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
    ("verify", 2): "verify DEVICE ssh://host",
    ("verify", 3): "verify PLAIN REPLICA --repair",
    ("verify", 5): "verify DEVICE STALE",
    ("verify", 6): "verify DEVICE TAKEN",
    ("start", 0): "start DEVICE",
    ("start", 2): "start --all",
    ("start", 3): "start PLAIN",
    ("stop", 2): "stop --all",
    ("stop", 3): "stop PLAIN",
    ("top", 0): "top DEVICE --once --interval 0.2",
    ("top", 2): "top --interval never",
    ("top", 3): "top PLAIN",
    ("history", 0): "history DEVICE",
    ("history", 2): "history DEVICE --last none",
    ("history", 3): "history PLAIN",
    ("metrics", 2): "metrics --output /nowhere/blktrack.prom",
    ("config", 0): "config check --file POLICY",
    ("config", 2): "config check --file /nowhere/policy",
    ("service", 0): "service show",
    ("service", 2): "service begin",
    ("install", 0): "install cron --print",
    ("install", 2): "install cron --print --every 7m",
    ("completion", 0): "completion bash",
    ("completion", 2): "completion fish",
    ("help", 0): "help sync",
    ("help", 2): "help me",
}


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


for name in ("untrack", "status", "stop", "start", "history"):
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
        return bench.run(f"verify {device} {replica} --repair --limit 8M")


@case("metrics", 0)
def figures(bench: Bench) -> Done:
    """Where no device is held by another run."""
    return bench.run("metrics", BLKTRACK_ROOT=str(bench.lab.name("root")))


@case("metrics", 6)
def _(bench: Bench) -> Done:
    with locked(bench.lab.store.paths.run / "metrics.lock"):
        return bench.run(f"metrics --output {bench.lab.folder / 'blktrack.prom'}")


CASES["recv", 0] = carried
CASES["recv", 1] = lambda bench: received(bench, b"no delta" * 100, str(bench.hosts.target))
CASES["recv", 6] = lambda bench: received(bench, bench.hosts.sent()[0], "TAKEN")


def unwritten(line: str) -> Case:
    """There is no room for what it prints."""

    def work(bench: Bench) -> Done:
        with open("/dev/full", "w", encoding="ascii") as full:
            running = bench.begin(line, {"PYTHONUNBUFFERED": ""}, stdout=full.fileno())
            done = running.end()
        return Done(done.code, "", done.err)

    return work


for name in ("top", "config", "install", "completion", "help"):
    CASES[name, 1] = unwritten(WORDS[name, 0])
CASES["metrics", 1] = unwritten("metrics")


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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_same_codes(command: str) -> None:
    documented = parsers().subparsers[command].exits
    assert {int(code) for code in documented if code.isdigit()} == {
        code for name, code in marks() if name == command
    }
    # What every process does on a signal needs no words.
    assert ("128+N" in documented) == (command in {*TELLS, *SILENT})


@pytest.mark.parametrize(("command", "code"), marks(), ids=str)
def test_codes(bench: Bench, command: str, code: int) -> None:
    done = CASES[command, code](bench)
    assert done.code == code, done
    assert TRACEBACK not in done.err
    if code == 0:
        assert beside_progress(done.err).count("\n") <= (2 if command == "send" else 0), (
            "progress or a warning"
        )
    elif (command, code) not in (("doctor", 1), ("verify", 5)):  # which report
        assert command == "send" or done.out == ""  # a delta without an end is none
        *_, sentence, hint = ["", *done.err.strip().splitlines()]
        assert re.match("blktrack[a-z ]*: ", sentence) and hint.startswith("  -> "), done.err


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_a_file_never_takes_the_place_of_a_standard_stream(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    """A library that speaks on standard error would write into it, be it a replica."""
    program = (
        "import os, sys; from blktrack.__main__ import run; "
        "sys.argv = ['blktrack', 'config', 'check', '--file', '/dev/null']; code = run(); "
        f"fd = os.open({str(tmp_path / 'file')!r}, os.O_RDWR | os.O_CREAT, 0o600); "
        "os.write(fd, b'%d %d %d' % (fd > 2, code, None in (sys.stdin, sys.stdout, sys.stderr)))"
    )

    def close() -> None:
        for number in closed:
            os.close(number)

    subprocess.run([sys.executable, "-c", program], preexec_fn=close, timeout=60, check=False)
    assert (tmp_path / "file").read_bytes() == b"1 %d 0" % (1 in closed)
