"""The history of runs: whole whatever dies when, its totals only grow, and no sync fails by it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blktrack import durable, history, sync
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Busy, Interrupted, NoPoint, UsageError
from blktrack.history import key, latest, read
from blktrack.options import Options
from blktrack.report import Run, SyncReport, Totals
from blktrack.state import LinkState, Store
from blktrack.tracker import tracker
from blktrack.units import KIB, MIB
from tests.blockdev import Lab, Silent, run, write_direct

DEVICE = "disk-1"
TARGET = "/backup/disk.img"

# Records runs for ever, and says how many there are.
WRITER = """
import sys
from pathlib import Path
from blktrack import history
from blktrack.config import Paths
from blktrack.state import Store

store, number = Store(Paths.below(Path(sys.argv[1]))), 0
while number < int(sys.argv[3]):
    number += 1
    with history.recorded(store, "disk-1", "sync", target=sys.argv[2], warn=sys.exit):
        pass
    print(number, flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(Paths.below(tmp_path))
    made.lib(DEVICE).mkdir(parents=True)
    return made


def report(**figures: Any) -> SyncReport:
    base = SyncReport(
        mode="incremental",
        reason="",
        consistency="crash",
        epoch=7,
        point=1.5e9,
        rounds=2,
        extents=3,
        bytes_changed=12288,
        bytes_shipped=8192,
        bytes_zeroed=4096,
        bytes_wire=0,
        freeze_s=0.25,
        duration_s=1.5,
    )
    for name, value in figures.items():
        setattr(base, name, value)
    return base


def succeed(store: Store, target: str = TARGET, **figures: Any) -> None:
    with recording(store, target) as done:
        done(report(**figures))


def fail(store: Store, error: BaseException, target: str = TARGET) -> None:
    with contextlib.suppress(type(error)), recording(store, target):
        raise error


@contextlib.contextmanager
def recording(store: Store, target: str = TARGET) -> Iterator[Any]:
    warnings: list[str] = []
    with history.recorded(store, DEVICE, "sync", target=target, warn=warnings.append) as done:
        yield done
    assert warnings == []


def path(store: Store) -> Path:
    return store.lib(DEVICE) / "history.jsonl"


def age(store: Store, days: float, lines: slice = slice(None)) -> None:
    """Make runs that are on record older."""
    found = [json.loads(line) for line in path(store).read_text().splitlines()]
    for line in found[lines]:
        line["begun"] -= days * 86400
    path(store).write_text("".join(f"{json.dumps(line)}\n" for line in found))


def test_what_is_recorded_is_read(store: Store) -> None:
    store.save_link(DEVICE, LinkState("uuid", "disk.img", TARGET))
    succeed(store)
    fail(store, NoPoint("no point was reached", hint="try again"))
    good, bad = read(store, DEVICE).runs
    assert {**report().as_json(), "command": "sync", "link": "disk.img"}.items() <= (
        good.as_json().items()
    )
    assert (good.exit, good.error, good.target) == (0, "", TARGET)
    assert (bad.exit, bad.error, bad.mode, bad.point) == (4, "no point was reached", "", None)
    assert bad.begun >= good.begun > 1.5e9
    assert read(store, "another").runs == []


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("wrong"), 2, "wrong"),
        (Busy("held"), 6, "held"),
        (Interrupted("ended", signum=signal.SIGTERM), 143, "ended"),
        (OSError(5, "Input/output error", "/dev/sdb"), 1, "[Errno 5] Input/output error: '/dev/s"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (BrokenPipeError(32, "Broken pipe"), 141, "[Errno 32] Broken pipe"),
        (BlktrackError("x" * 5000), 1, "x" * 2000 + "..."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_way_to_fail(store: Store, error: BaseException, code: int, text: str) -> None:
    fail(store, error)
    (found,) = read(store, DEVICE).runs
    assert found.exit == code
    assert found.error.startswith(text)


def test_totals(store: Store) -> None:
    succeed(store)
    succeed(store, mode="resync", freeze_s=0.5)
    fail(store, BlktrackError("no"))
    fail(store, Busy("held"))
    fail(store, NoPoint("no"))
    succeed(store, "/other")
    runs = read(store, DEVICE).runs
    assert runs[5].totals.runs == 1
    assert runs[4].totals == Totals(
        runs=5,
        busy=1,
        failures=2,
        failures_in_a_row=2,
        resyncs=1,
        rounds=4,
        bytes_changed=24576,
        bytes_shipped=16384,
        bytes_zeroed=8192,
        freeze_s=0.75,
        last_freeze_s=0.5,
        succeeded=runs[1].begun + 1.5,
    )
    succeed(store, freeze_s=0.0)
    assert (total := read(store, DEVICE).runs[-1].totals).failures_in_a_row == 0
    assert (total.failures, total.last_freeze_s, total.freeze_s) == (2, 0.0, 0.75)


def test_a_link_that_got_its_name_goes_on(store: Store) -> None:
    """A first sync that is refused makes no link; a stream is known by its name alone."""
    fail(store, BlktrackError("refused"))
    store.save_link(DEVICE, LinkState("1", "disk.img", TARGET))
    succeed(store)
    with history.recorded(store, DEVICE, "send", link="disk.img", warn=pytest.fail):
        pass
    with history.recorded(store, DEVICE, "send", link="far", warn=pytest.fail):
        pass
    first, second, sent, far = read(store, DEVICE).runs
    assert (first.link, second.link, sent.target) == ("", "disk.img", TARGET)
    assert (sent.totals.runs, sent.totals.failures) == (3, 1)
    assert (far.target, far.totals.runs) == ("", 1)
    wanted = {key("disk.img", TARGET), key("far", ""), key("never", "")}
    assert latest(store, DEVICE, wanted) == {("", "far"): far, (TARGET, ""): sent}


def test_trimmed_by_age(store: Store) -> None:
    """Once a day; the last line of each link stays, and its totals go on."""
    succeed(store, "/seldom")
    for _ in range(4):
        succeed(store)
    age(store, 91, slice(0, 3))
    age(store, 89, slice(3, 5))
    succeed(store)
    runs = read(store, DEVICE).runs
    assert [run.target for run in runs] == ["/seldom", TARGET, TARGET, TARGET]
    assert [run.totals.runs for run in runs] == [1, 3, 4, 5]
    succeed(store, "/seldom")
    assert read(store, DEVICE).runs[-1].totals.runs == 2


def test_kept_as_long_as_told(store: Store) -> None:
    for _ in range(3):
        succeed(store)
    age(store, 8)
    with history.recorded(store, DEVICE, "sync", target=TARGET, keep=9 * 86400, warn=pytest.fail):
        pass
    assert len(read(store, DEVICE).runs) == 4
    age(store, 1)
    age(store, 0.5, slice(0, 3))
    with history.recorded(store, DEVICE, "sync", target=TARGET, keep=9 * 86400, warn=pytest.fail):
        pass
    assert [run.totals.runs for run in read(store, DEVICE).runs] == [4, 5]


def test_trimmed_by_number(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every run: a tenth more may be there."""
    monkeypatch.setattr(history, "MOST", 20)
    succeed(store, "/seldom")
    sizes, totals = [], []
    for _ in range(60):
        succeed(store)
        runs = read(store, DEVICE).runs
        sizes.append(len(runs))
        totals.append(runs[-1].totals)
        assert runs[0].target == "/seldom"
    assert max(sizes) == 22
    assert sizes.count(21) > 15  # the newest 20 and the one that stays
    assert [total.runs for total in totals] == list(range(1, 61))
    assert [total.rounds for total in totals] == list(range(2, 122, 2))


DAMAGE = [
    b'{"command": "sync", "li',
    b"\0" * 600,
    b"[]",
    b"7",
    b'{"totals": {}}',
    b"\xff\xfe",
    b"[" * 100_000,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line(store: Store, damage: bytes) -> None:
    succeed(store)
    with path(store).open("ab") as file:
        file.write(damage)
    # Nobody knows yet whether it is being written.
    assert (len(read(store, DEVICE).runs), read(store, DEVICE).damaged) == (1, 0)
    succeed(store)
    succeed(store)
    found = read(store, DEVICE)
    assert found.damaged == 1
    assert [run.totals.runs for run in found.runs] == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        *({"exit": "0"}, {"begun": None}, {"link": 3}, {"totals": []}),
        *({"begun": math.nan}, {"begun": math.inf}, {"begun": 1e17}, {"duration_s": math.nan}),
        *({"begun": 10**400}, {"bytes_changed": 10**400}, {"freeze_s": -math.inf}),
    ],
)
def test_a_value_of_another_kind(store: Store, change: dict[str, Any]) -> None:
    succeed(store)
    path(store).write_text(f"{json.dumps(json.loads(path(store).read_text()) | change)}\n")
    assert read(store, DEVICE).damaged == 1
    succeed(store)
    assert [run.totals.runs for run in read(store, DEVICE).runs] == [1]


def test_keys_of_a_newer_version(store: Store) -> None:
    succeed(store)
    line = json.loads(path(store).read_text())
    line["new"], line["totals"]["newer"], line["begun"] = 1, [2], 5
    path(store).write_text(f"{json.dumps(line)}\n")
    found = read(store, DEVICE)
    assert (len(found.runs), found.damaged, found.runs[0].begun) == (1, 0, 5)


def test_two_writers_at_once(store: Store, tmp_path: Path) -> None:
    """Of two links and, both, of a third: no line is lost, none is torn, no total is."""
    count = 60
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, target, str(count)], stdout=subprocess.DEVNULL)
        for target in ("/a", "/b", "/c", "/c")
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0, 0]
    found = read(store, DEVICE)
    assert (len(found.runs), found.damaged) == (4 * count, 0)
    for target, runs in (("/a", count), ("/b", count), ("/c", 2 * count)):
        totals = [run.totals.runs for run in found.runs if run.target == target]
        assert totals == list(range(1, runs + 1))


def test_killed_writers(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others trim all the time: what was said to be recorded is, and nothing is torn."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), TARGET, "1000000"]
    monkeypatch.setattr(history, "MOST", 10)
    recorded = 0
    for _ in range(8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            for _ in range(5):
                said = int(writer.stdout.readline())
                succeed(store, "/other")
            writer.kill()
            said = max([said, *map(int, writer.stdout.read().split())])
        found = read(store, DEVICE)
        assert found.damaged == 0
        total = latest(store, DEVICE, {key("", TARGET)})[TARGET, ""].totals.runs
        assert recorded + said <= total <= recorded + said + 1
        recorded = total


@pytest.mark.needs("root")
def test_a_line_that_does_not_fit(store: Store) -> None:
    """On a full disk part of it may be written: it is taken back, and the next line is whole."""
    folder = store.paths.lib / "devices"
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder))
    try:
        store.lib(DEVICE).mkdir()
        succeed(store)
        free = os.statvfs(folder)
        (folder / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize))
        sizes = []
        for _ in range(20):
            warnings: list[str] = []
            with history.recorded(store, DEVICE, "sync", target=TARGET, warn=warnings.append):
                pass
            sizes.append(path(store).stat().st_size)
            if warnings:
                break
        assert "No space left" in warnings[0], warnings
        assert sizes[-1] == sizes[-2]
        (folder / "filler").unlink()
        succeed(store)
        found = read(store, DEVICE)
        assert (found.damaged, len(found.runs)) == (0, len(sizes) + 1)
    finally:
        run("umount", str(folder))


# Of real runs.

real = pytest.mark.needs("root", "loop", "bpf")


def runs_of(lab: Lab, device: str) -> list[Run]:
    found = read(lab.store, tracker.find(lab.store, device)[0].id)
    assert found.damaged == 0
    return found.runs


@real
def test_syncs_are_recorded(shared: Lab) -> None:
    device, replica = shared.loop(4 * MIB), shared.name("replica")
    shared.track(device)
    words = ("sync", device, replica, "--consistency", "none")
    reports = [shared.blktrack(*words, "--json").json]
    write_direct(device, 8 * KIB, b"x" * 64 * KIB)
    reports += [shared.blktrack(*words, "--json").json for _ in range(2)]
    assert [report["mode"] for report in reports] == ["initial", "incremental", "nothing"]
    runs = runs_of(shared, device)
    for report, found in zip(reports, runs, strict=True):
        told = {"command": "sync", "link": replica.name, "target": str(replica), "exit": 0}
        assert {**report, **told}.items() <= found.as_json().items()
    for name in ("rounds", "bytes_changed", "bytes_shipped", "bytes_zeroed", "freeze_s"):
        assert getattr(runs[-1].totals, name) == sum(report[name] for report in reports)


@real
def test_runs_that_fail_are_recorded(shared: Lab) -> None:
    device, replica = shared.loop(MIB), shared.name("replica")
    assert shared.blktrack("sync", device, replica).code == 3  # and no history, as no device
    shared.track(device)
    shared.sync(device, replica)
    state, _ = tracker.find(shared.store, device)
    (link,) = shared.store.links(state.id)
    with durable.lock(shared.store.link_lock(state.id, link.id), what="the link"):
        assert shared.blktrack("sync", device, replica).code == 6
    shared.untrack(device)
    shared.track(device)
    assert shared.blktrack("sync", device, replica, "--no-resync").code == 3
    foreign = shared.name("foreign")
    foreign.write_bytes(b"x" * MIB)
    assert shared.blktrack("sync", device, foreign).code == 1
    good, busy, resync, refused = runs_of(shared, device)
    assert (good.exit, busy.exit, resync.exit, refused.exit) == (0, 6, 3, 1)
    assert busy.error == f"the link to {replica} is held by another run"
    assert "needs a resync" in resync.error or "has a gap" in resync.error
    assert (refused.link, refused.target, refused.totals.runs) == ("", str(foreign), 1)
    assert (resync.totals.runs, resync.totals.busy, resync.totals.failures) == (3, 1, 1)


@real
def test_streams_are_recorded(shared: Lab) -> None:
    device = shared.loop(MIB)
    shared.track(device)
    done = shared.blktrack("send", device, "--link", "far", "--json", "--consistency", "none")
    report = json.loads(done.err)
    (found,) = runs_of(shared, device)
    assert (found.command, found.link, found.target) == ("send", "far", "")
    assert found.bytes_wire == found.totals.bytes_wire == report["bytes_wire"] > 0
    assert found.point == report["point"]


@real
@pytest.mark.parametrize("obstacle", ["read-only", "folder", "held"])
def test_a_sync_that_cannot_be_recorded_is_done(
    shared: Lab, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    device, replica = shared.loop(MIB), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    number = tracker.find(shared.store, device)[0].id
    file, observer = shared.store.lib(number) / "history.jsonl", Silent()
    options = Options(consistency="none")

    def sync_again(reason: str) -> None:
        write_direct(device, 0, os.urandom(4 * KIB))
        report, _ = sync.sync(shared.store, device, str(replica), options, observer)
        assert (report.mode, report.bytes_shipped) == ("incremental", 4 * KIB)
        (warning,) = observer.warnings
        assert warning.startswith("this run is missing in the history: "), warning
        assert reason in warning

    match obstacle:
        case "read-only":
            with bound(file):
                sync_again("Read-only file system")
        case "folder":
            file.unlink()
            file.mkdir()
            sync_again("Is a directory")
        case "held":
            monkeypatch.setattr(history, "_PATIENCE", 0.1)
            with durable.lock(shared.store.run(number) / "history.lock", what="it"):
                sync_again("is held by another run")


@contextlib.contextmanager
def bound(file: Path) -> Iterator[None]:
    """Read-only, for root too."""
    run("mount", "--bind", file, file)
    try:
        run("mount", "-o", "remount,bind,ro", file)
        yield
    finally:
        run("umount", file)


@real
@pytest.mark.parametrize(
    ("point", "runs"), [("commit-sets", 1), ("history-begun", 1), ("history-appended", 2)]
)
def test_a_run_that_is_killed(shared: Lab, point: str, runs: int) -> None:
    """It leaves no line, or a whole one; the next one goes on."""
    device, replica = shared.loop(MIB), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    write_direct(device, 0, b"x" * 4096)
    died = shared.blktrack(
        "sync", device, replica, "--consistency=none", env={"BLKTRACK_CRASH": point}
    )
    assert died.code == -signal.SIGKILL
    assert len(runs_of(shared, device)) == runs
    shared.sync(device, replica)
    found = runs_of(shared, device)
    assert [one.totals.runs for one in found] == list(range(1, runs + 2))
    assert sum(one.mode == "nothing" for one in found) == 1
