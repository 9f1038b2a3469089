"""`blktrack history`: the runs that were asked for, as a table that fits and as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from blktrack.cli import history as command
from blktrack.report import HistoryReport, Run
from blktrack.tracker import tracker
from blktrack.units import GIB, KIB, MIB
from tests.background import assert_clear
from tests.blockdev import Lab, write_direct

WHEN = time.mktime((2026, 11, 4, 7, 5, 9, 0, 0, -1))


def a_run(**rest: object) -> Run:
    made = Run("sync", "disk.img", "/backup/disk.img", WHEN, duration_s=0.25, exit=0, error="")
    for name, value in rest.items():
        setattr(made, name, value)
    return made


GOOD = a_run(mode="incremental", rounds=2, bytes_changed=12 * MIB, bytes_shipped=1536, freeze_s=0.1)
BUSY = a_run(exit=6, error="the link to /backup/disk.img is held by another run", duration_s=4000)
WIDE = a_run(
    link="a-name-that-is-much-too-long-for-any-table.img",
    mode="incremental",
    rounds=17,
    bytes_changed=123 * GIB,
    bytes_shipped=123 * KIB,
    freeze_s=1.25,
    duration_s=7384,
)
EXPECTED = """\
when         replica  mode        changed shipped rounds freeze    time result
Nov 04 07:05 disk.img incremental  12 MiB 1.5 KiB      2 0.10 s  0.25 s ok
Nov 04 07:05 disk.img -                 -       -      -      - 1:06:40 busy
  the link to /backup/disk.img is held by another run"""


def test_table() -> None:
    assert command._table([GOOD, BUSY], 80) == EXPECTED


def test_table_fits() -> None:
    long = a_run(exit=143, error="no point: " + "some words " * 30 + "/a/path/of/some-length")
    for width in (80, 90, 200):
        lines = command._table([WIDE, long], width).splitlines()
        assert all(len(line) <= width for line in lines), lines
    assert "a-name-that-is-much-too-long-for-any-table.img" in lines[1]
    narrow = command._table([WIDE], 80).splitlines()
    assert " ~table.img incremental 123 GiB 123 KiB     17 1.25 s 2:03:04 ok" in narrow[1]


def test_a_first_run_that_failed_has_its_targets_name() -> None:
    table = command._table([a_run(link="", target="/backup/new.img", exit=1, error="no")], 80)
    assert "new.img" in table


@pytest.mark.needs("root", "loop", "bpf")
def test_the_runs_asked_for(shared: Lab) -> None:
    device, one, other = shared.loop(MIB), shared.name("one"), shared.name("other")
    shared.track(device)
    none = shared.blktrack("history", device)
    assert (none.code, none.out) == (0, f"no run of {device} is on record\n")
    for number in range(3):
        write_direct(device, 0, bytes([number + 1]) * 4096)
        shared.sync(device, one)
    shared.sync(device, other)
    foreign = shared.name("foreign")
    foreign.write_bytes(b"x" * MIB)
    assert shared.blktrack("sync", device, foreign).code == 1

    def asked(*words: str | Path) -> list[tuple[str, int]]:
        found = shared.blktrack("history", device, *words, "--json").json
        assert set(found) == set(HistoryReport("", [], 0).as_json())
        assert (found["device"], found["damaged"]) == (device, 0)
        return [(run["target"], run["totals"]["runs"]) for run in found["runs"]]

    ones = [(str(one), number) for number in (1, 2, 3)]
    refused = (str(foreign), 1)
    assert asked() == [*ones, (str(other), 1), refused]
    assert asked("--last", "2") == [(str(other), 1), refused]
    assert asked("--target", one) == asked("--target", one.name) == ones
    assert asked("--target", one, "--last", "1") == ones[2:]
    assert asked("--failed") == [refused]
    assert asked("--failed", "--target", one) == []
    table = shared.blktrack("history", device, "--last", "1").out
    assert table.splitlines()[1].endswith("exit 1")
    assert table.splitlines()[2].startswith(f"  {foreign} ")
    quiet = shared.blktrack("history", device, "--failed", "--target", one)
    assert quiet.out == f"no failed run of {one} is on record\n"

    # What is away or no longer tracked has a history still.
    shared.untrack(device)
    assert asked("--failed") == [refused]


@pytest.mark.needs("root", "loop", "bpf")
def test_a_damaged_history(shared: Lab) -> None:
    device = shared.loop(MIB)
    shared.track(device)
    shared.sync(device, shared.name("replica"))
    file = shared.store.lib(tracker.find(shared.store, device)[0].id) / "history.jsonl"
    with file.open("a") as added:
        added.write("{\n7\n")
    shared.sync(device, shared.name("replica"))
    done = shared.blktrack("history", device, "--json")
    assert [run["exit"] for run in json.loads(done.out)["runs"]] == [0, 0]
    assert json.loads(done.out)["damaged"] == 2
    told = f"blktrack: warning: 2 damaged lines are left out of the history of {device}\n"
    assert (done.code, done.err) == (0, told)
    file.unlink()
    file.mkdir()
    assert_clear(shared.blktrack("history", device), 1, f"cannot read {file}: Is a directory")


@pytest.mark.needs("root", "loop", "bpf")
@pytest.mark.parametrize("count", ["0", "-1", "x", "9" * 5000])
def test_wrong_count(shared: Lab, count: str) -> None:
    done = shared.blktrack("history", "/dev/null", f"--last={count}")
    told = f"blktrack history: --last: {count[:20]!r} is not a number of runs"
    told += "\n  -> see blktrack history --help\n"
    assert (done.code, done.out, done.err) == (2, "", told)


@pytest.mark.needs("root", "loop", "bpf")
def test_nothing_of_that_name(shared: Lab) -> None:
    device = shared.loop(MIB)
    assert_clear(shared.blktrack("history", device), 3, f"{device} is not tracked")
    shared.track(device)
    done = shared.blktrack("history", device, "--target", "/none")
    assert_clear(done, 2, f"{device} has no replica /none", "blktrack status")
