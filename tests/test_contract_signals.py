"""Signals at any command, and what goes where when all is well."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable

import pytest

from blktrack.cli import COMMANDS, parsers
from blktrack.options import Options
from tests.background import TRACEBACK, Running, past_start
from tests.bench import (
    DEVICE_STATE,
    SILENT,
    SIZE,
    TELLS,
    WAITING,
    Bench,
    beside_progress,
    carried,
    lock_of,
)
from tests.blockdev import Done, wait_until
from tests.streams import LINK
from tests.test_contract import WORDS, figures, rows
from tests.test_events import filled

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


Start = Callable[[Bench, contextlib.ExitStack], Running]


def on_the_way(line: str, *opens: str) -> Start:
    """It has this open, and is slow; or has told something, and goes on."""

    def begin(bench: Bench, _: contextlib.ExitStack) -> Running:
        running = bench.begin(line.replace("NEW", str(bench.lab.name("replica"))))
        if opens:
            running.until_open(*(bench.named[name] for name in opens))
        else:
            assert running.process.stdout and running.process.stdout.readline()
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
        running = bench.begin(f"recv {target}", bench.hosts.there, reader)
    thread = threading.Thread(target=file.write, args=(delta[: SIZE // 2],))
    thread.start()
    running.until_open(target)
    thread.join()
    return running


def reads_a_pipe(line: str, file: str = DEVICE_STATE) -> Start:
    """What it has to read is slow to come: a pipe that has nothing in it. FILE stands for it."""

    def begin(bench: Bench, stack: contextlib.ExitStack) -> Running:
        root = bench.lab.name("root")
        pipe = root / file
        pipe.parent.mkdir(parents=True)
        os.mkfifo(pipe)
        running = bench.begin(line.replace("FILE", str(pipe)), {"BLKTRACK_ROOT": str(root)})
        found: list[int] = []

        def has_come() -> bool:
            with contextlib.suppress(OSError):  # nobody reads it
                found.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            return bool(found)

        wait_until(has_come, "the reading of the pipe")
        stack.callback(os.close, found[0])
        return running

    return begin


ON_THE_WAY: dict[str, Start] = {
    "doctor": doctor_on_the_way,
    "recv": recv_on_the_way,
    "top": on_the_way("top DEVICE --json --interval 0.1"),
    "config": reads_a_pipe("config check --file FILE"),
    "install": reads_a_pipe("install cron", "etc/blktrack/blktrack.toml"),
    "service": reads_a_pipe("service show"),
    "sync": on_the_way("sync DEVICE NEW --limit 256K", "DEVICE"),
    "send": on_the_way(f"send DEVICE --link {LINK} --full --limit 256K", "DEVICE"),
    "verify": on_the_way("verify DEVICE REPLICA --limit 256K", "DEVICE", "REPLICA"),
    **{name: waits(line) for name, line in WAITING.items()},
}


def test_every_command_that_lasts_is_here() -> None:
    assert {command for command, row in rows().items() if row["128+"]} == set(ON_THE_WAY)


@pytest.mark.parametrize("command", ON_THE_WAY)
def test_codes_of_signals(bench: Bench, command: str) -> None:
    for number in SIGNALS:
        with contextlib.ExitStack() as stack:
            running = ON_THE_WAY[command](bench, stack)
            running.process.send_signal(number)
            done = running.end()
        # A shell shows a death by a signal as 128+N too.
        handled = command in {*TELLS, *SILENT}
        assert done.code == (128 + number if handled else -number), done
        assert TRACEBACK not in done.err
        assert ("interrupted" in done.err) == (command in TELLS), done.err
    assert bench.lab.status(bench.hosts.source)["state"] == "tracking"


def options_of(command: str) -> set[str]:
    actions = parsers().subparsers[command].arguments
    return {word for action in actions for word in action.option_strings}


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
        assert command == "send" or beside_progress(other) == ""
        if how == "--json":
            assert result.count("\n") == 1 and isinstance(json.loads(result), dict)
        else:
            assert bool(result) == (how == ""), result


def well(bench: Bench, command: str, how: str) -> Done:
    """A run of a command in which all is well."""
    match command:
        case "recv":
            return carried(bench, how)
        case "metrics":
            return figures(bench)
        case "untrack" | "stop":
            device = filled(bench.lab, SIZE)
            bench.lab.track(device)
            return bench.run(f"{command} {device} {how}")
    return bench.run(f"{WORDS[command, 0]} {how}")
