"""`blktrack metrics`: what Prometheus reads is what `status` and `history` say, come what may."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack import durable, metrics
from blktrack.metrics.text import Exposition, Metric
from blktrack.state import Doubt
from blktrack.tracker import tracker
from blktrack.tracker.doubt import LOSSES
from blktrack.units import KIB, MIB
from tests.background import Running, assert_clear
from tests.blockdev import Lab, lab_in_memory, run, write_direct
from tests.needs import TOOL_PATH

real = pytest.mark.needs("root", "loop", "bpf")

SWITCH = Path("/proc/sys/kernel/bpf_stats_enabled")
LINE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Labels = dict[str, str]
Sample = tuple[Labels, float]


@pytest.fixture(scope="module")
def alone() -> Iterator[Lab]:
    """An instance in which no device is held, as some of the session's may be."""
    with pytest.MonkeyPatch.context() as patch, lab_in_memory(patch.setenv) as made:
        made.track(made.loop(MIB))
        yield made


@pytest.fixture
def shared(alone: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("BLKTRACK_ROOT", str(alone.folder / "root"))
    with alone.fresh() as made:
        yield made


def samples(text: str) -> dict[str, list[Sample]]:
    """By name without its prefix. A reader of its own: no part of what writes it is in it."""
    found: dict[str, list[Sample]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            labels = dict(LABEL.findall(match["labels"] or ""))
            name = match["name"].removeprefix("blktrack_")
            found.setdefault(name, []).append((labels, float(match["value"])))
    return found


def look(lab: Lab) -> dict[str, list[Sample]]:
    done = lab.blktrack("metrics")
    assert (done.code, done.err) == (0, "")
    return samples(done.out)


def value(found: dict[str, list[Sample]], name: str, **labels: str) -> float | None:
    """The one sample with these labels, whatever others it has; None if there is none."""
    rest = [v for has, v in found.get(name, []) if labels.items() <= has.items()]
    assert len(rest) <= 1, f"{name} {labels}: {rest}"
    return rest[0] if rest else None


def promtool(*words: str | Path, stdin: bytes = b"") -> None:
    done = subprocess.run(
        ["promtool", *map(str, words)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "PATH": TOOL_PATH},
        check=False,
    )
    said = (done.stdout + done.stderr).decode()
    assert (done.returncode, "error" in said.lower()) == (0, False), said
    if words[:2] == ("check", "metrics"):
        assert said == "", said


def write_policy(lab: Lab, text: str) -> None:
    file = lab.store.paths.policy
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    lab.stack.callback(file.unlink)


@real
def test_figures_are_those_of_status_and_history(shared: Lab) -> None:
    device, replica = shared.loop(4 * MIB), shared.name("replica")
    shared.track(device)
    words = ("sync", device, replica, "--consistency", "none", "--json")
    reports = [shared.blktrack(*words).json]
    write_direct(device, 64 * KIB, b"x" * 256 * KIB)
    reports.append(shared.blktrack(*words).json)
    write_direct(device, 0, b"y" * 12 * KIB)
    begun = time.time()
    found = look(shared)
    status = shared.status(device)
    (link,) = status["links"]
    runs = shared.blktrack("history", device, "--json").json["runs"]

    def of_device(name: str) -> float | None:
        return value(found, f"device_{name}", device=device)

    assert of_device("up") == 1
    assert value(found, "device_state", device=device, state="tracking") == 1
    assert value(found, "device_state", device=device, state="gap") == 0
    assert of_device("size_bytes") == 4 * MIB
    assert of_device("granularity_bytes") == status["granularity"]
    assert of_device("dirty_bytes") == status["dirty_bytes"] == 12 * KIB
    assert of_device("written_bytes_total") == status["written_bytes"] == 268 * KIB
    assert of_device("writes_total") == status["writes"] > 1
    assert of_device("generation_start_timestamp_seconds") == status["since"]
    assert (
        of_device("kernel_memory_bytes") == tracker.track(shared.store, device, None).kernel_bytes
    )
    losses = [v for has, v in found["device_losses_total"] if has["device"] == device]
    assert (len(losses), sum(losses)) == (len(LOSSES), status["losses"])

    def of_link(name: str) -> float | None:
        of = {"device": device, "link": replica.name, "target": str(replica)}
        return value(found, f"link_{name}", **of)

    assert value(found, "link_state", target=str(replica), state="ready") == 1
    assert of_link("point_timestamp_seconds") == link["point"] == reports[1]["point"]
    assert abs((of_link("lag_seconds") or 0) - (begun - link["point"])) < 60
    assert of_link("pending_bytes") == link["pending_bytes"] == 12 * KIB
    assert of_link("in_progress") == 0
    last = runs[-1]
    assert of_link("last_run_timestamp_seconds") == last["begun"] + last["duration_s"]
    assert of_link("last_success_timestamp_seconds") == last["totals"]["succeeded"]
    assert of_link("last_run_duration_seconds") == reports[1]["duration_s"]
    assert of_link("last_run_exit_code") == of_link("failures_in_a_row") == 0
    assert (of_link("runs_total"), of_link("failures_total")) == (2, 0)
    for name, key in (
        ("rounds_total", "rounds"),
        ("changed_bytes_total", "bytes_changed"),
        ("shipped_bytes_total", "bytes_shipped"),
        ("zeroed_bytes_total", "bytes_zeroed"),
    ):
        assert of_link(name) == sum(report[key] for report in reports)
    assert (of_link("shipped_bytes_total") or 0) > 0


@real
def test_failures_and_doubts(shared: Lab) -> None:
    device, replica = shared.loop(MIB), shared.name("replica")
    shared.track(device)
    doubts = Doubt.count(tracker.find(shared.store, device)[0].doubts)  # of others of its name
    shared.sync(device, replica)
    found = look(shared)
    assert value(found, "device_doubts_total", device=device) == doubts
    shared.untrack(device)
    assert value(look(shared), "device_up", device=device) is None
    shared.track(device)
    for _ in range(2):
        assert shared.blktrack("sync", device, replica, "--no-resync").code == 3
    found = look(shared)
    assert value(found, "link_state", target=str(replica), state="resync") == 1
    assert value(found, "device_doubts_total", device=device) == doubts + 1
    assert value(found, "link_failures_in_a_row", target=str(replica)) == 2
    assert value(found, "link_last_run_exit_code", target=str(replica)) == 3
    success = value(found, "link_last_success_timestamp_seconds", target=str(replica))
    failed = value(found, "link_last_failure_timestamp_seconds", target=str(replica))
    assert failed == value(found, "link_last_run_timestamp_seconds", target=str(replica))
    assert success and success < (
        value(found, "link_last_run_timestamp_seconds", target=str(replica)) or 0
    )
    shared.sync(device, replica)
    found = look(shared)
    assert value(found, "link_resyncs_total", target=str(replica)) == 1
    assert value(found, "link_failures_in_a_row", target=str(replica)) == 0
    assert value(found, "link_failures_total", target=str(replica)) == 2


def test_doubts_are_counted_beyond_those_that_are_kept() -> None:
    doubts = [Doubt("", "from before they had numbers", 1.0) for _ in range(3)]
    for number in range(50):
        assert Doubt.count(doubts) == number + 3
        Doubt.add(doubts, "", "no")
    assert len(doubts) == 20


@real
def test_promises(shared: Lab) -> None:
    device, replica = shared.loop(MIB), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    new, off, away = (shared.name(kind) for kind in ("new", "off", "away"))
    write_policy(
        shared,
        f"""
        [device.data]
        path = "{device}"
        [device.data.replica.one]
        target = "{replica}"
        rpo = "5m"
        [device.data.replica.new]
        target = "{new}"
        rpo = "1m"
        rpo-warning = "2m"
        rpo-error = "3m"
        [device.data.replica.off]
        target = "{off}"
        enabled = false
        [device.other]
        path = "/dev/blktrack-none"
        [device.other.replica.away]
        target = "{away}"
        """,
    )
    found = look(shared)
    assert value(found, "policy_valid") == 1
    for target, promise in ((replica, (300, 300, 600)), (new, (60, 120, 180))):
        names = ("link_rpo_seconds", "link_rpo_warning_seconds", "link_rpo_error_seconds")
        assert tuple(value(found, name, target=str(target)) for name in names) == promise
    assert value(found, "link_state", target=str(replica), state="ready") == 1
    assert value(found, "link_state", target=str(new), device=device, state="initial") == 1
    assert value(found, "link_state", target=str(away), state="initial") == 1
    assert value(found, "device_state", device="/dev/blktrack-none", state="untracked") == 1
    assert value(found, "link_state", target=str(off), state="initial") is None


@real
def test_a_policy_that_is_broken(shared: Lab) -> None:
    device, replica = shared.loop(MIB), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    write_policy(shared, "[device.data]\npath = 3\n")
    done = shared.blktrack("metrics")
    assert done.code == 0
    assert done.err.startswith("blktrack: warning: without what the policy promises: ")
    assert len(done.err.splitlines()) == 1
    found = samples(done.out)
    assert value(found, "policy_valid") == value(found, "up") == 0
    assert value(found, "link_state", target=str(replica), state="ready") == 1


@real
def test_a_device_that_is_held(shared: Lab) -> None:
    """By a sync that closes an epoch, say: what can be had without its lock is there."""
    device, other, replica = shared.loop(MIB), shared.loop(MIB), shared.name("replica")
    shared.track(device)
    shared.track(other)
    shared.sync(device, replica)
    number = tracker.find(shared.store, device)[0].id
    with durable.lock(shared.store.run(number) / "lock", what="it"):
        figures = metrics.collect(shared.store, wait=0.05)
    assert figures.warnings == [f"device {device} is held by another run"]
    found = samples(figures.text.decode())
    assert value(found, "up") == value(found, "device_up", device=device) == 0
    assert value(found, "device_up", device=other) == 1
    assert value(found, "device_state", device=device, state="tracking") is None
    assert value(found, "device_losses_total", device=device, cause="full") == 0
    assert value(found, "link_runs_total", target=str(replica)) == 1
    assert value(found, "link_lag_seconds", target=str(replica)) is not None


@real
@pytest.mark.parametrize("file", ["device.json", "history.jsonl", "links"])
def test_state_that_is_damaged(shared: Lab, file: str) -> None:
    device, other, replica = shared.loop(MIB), shared.loop(MIB), shared.name("replica")
    for path in (device, other):
        shared.track(path)
    shared.sync(device, replica)
    number = tracker.find(shared.store, device)[0].id
    damaged = shared.store.lib(number) / file
    if file == "history.jsonl":
        damaged.unlink()
        damaged.mkdir()
        shared.stack.callback(damaged.rmdir)
    else:
        (damaged,) = [damaged] if file.endswith("json") else list(damaged.iterdir())
        before = damaged.read_bytes()
        damaged.write_text("{")
        shared.stack.callback(damaged.write_bytes, before)
    done = shared.blktrack("metrics")
    assert done.code == 0
    assert str(damaged) in done.err
    found = samples(done.out)
    assert value(found, "up") == 0
    assert value(found, "device_up", device=other) == 1
    if file == "history.jsonl":
        assert value(found, "device_up", device=device) == 1
    elif file == "links":
        assert value(found, "device_up", device=device) == 0
    else:
        assert value(found, "device_up", device=number) == 0
    if file != "history.jsonl":
        damaged.write_bytes(before)


@real
def test_a_sync_under_way(shared: Lab) -> None:
    """It is seen, and not disturbed."""
    device, replica = shared.loop(8 * MIB), shared.name("replica")
    shared.track(device)
    write_direct(device, 0, os.urandom(8 * MIB))
    sync = Running(shared, "sync", device, replica, "--limit", "2M", "--consistency", "none")
    sync.until_open(device, replica)
    found = look(shared)
    assert value(found, "link_in_progress", target=str(replica)) == 1
    assert value(found, "device_up", device=device) == 1
    sync.process.send_signal(signal.SIGTERM)
    assert sync.end().code == 143
    found = look(shared)
    assert value(found, "link_in_progress", target=str(replica)) == 0
    assert value(found, "link_last_run_exit_code", target=str(replica)) == 143


@real
def test_cost_per_write(lab: Lab) -> None:
    """It is there if the kernel was asked to count, which is for all of its programs."""
    device = lab.loop(MIB)
    lab.track(device)
    before = SWITCH.read_text()
    if before.strip() == "0":
        assert value(look(lab), "device_write_cost_seconds", device=device) is None
        assert "program_runs_total" not in look(lab)
    try:
        SWITCH.write_text("1")
        write_direct(device, 0, b"x" * 4 * KIB)
    finally:
        SWITCH.write_text(before)
    found = look(lab)
    runs = {has["program"]: v for has, v in found["program_runs_total"]}
    spent = {has["program"]: v for has, v in found["program_run_seconds_total"]}
    assert set(runs) == set(spent) == {"blk_rq_issue", "blk_rq_complete"}
    cost = value(found, "device_write_cost_seconds", device=device)
    assert cost == pytest.approx(sum(spent[name] / runs[name] for name in runs))
    assert cost and 0 < cost < 0.01


@real
def test_nothing_tracked(lab: Lab) -> None:
    found = look(lab)
    assert value(found, "up") == value(found, "policy_valid") == 1
    assert not [name for name in found if name.startswith(("device", "link", "program"))]


@pytest.mark.needs("promtool")
@real
def test_promtool_finds_nothing(shared: Lab) -> None:
    device = shared.loop(MIB)
    shared.track(device)
    shared.sync(device, shared.name("replica"))
    promtool("check", "metrics", stdin=shared.blktrack("metrics").out.encode())


def test_format() -> None:
    catalogue = [Metric("a", "gauge", "back\\slash\nand line"), Metric("none", "gauge", "")]
    out = Exposition([*catalogue, Metric("b_total", "counter", "")], "x_")
    out.add("a", 1.5, {"path": 'q"\\\n', "empty": ""})
    out.add("a", None, {"path": "unknown"})
    out.add("a", float("nan"), {"path": os.fsdecode(b"/b\xff")})
    out.add("b_total", 2**60 + 1, {})
    out.add("b_total", 2**60 + 3, {})
    assert out.text == (
        b"# HELP x_a back\\\\slash\\nand line\n# TYPE x_a gauge\n"
        b'x_a{path="q\\"\\\\\\n"} 1.5\nx_a{path="/b\\\\udcff"} NaN\n'
        b"# HELP x_b_total \n# TYPE x_b_total counter\nx_b_total 1152921504606846979\n"
    )


@real
def test_to_a_file(shared: Lab) -> None:
    folder = shared.name("collector")
    folder.mkdir()
    file = folder / "blktrack.prom"
    before = os.umask(0o077)
    try:
        for _ in range(2):
            done = shared.blktrack("metrics", "--output", file)
            assert (done.code, done.out, done.err) == (0, "", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert value(samples(file.read_text()), "up") == 1
    # Unfinished, it is not there, whatever dies: nothing that the collector reads.
    old = file.read_text()
    died = shared.blktrack("metrics", "--output", file, env={"BLKTRACK_CRASH": "file-written"})
    assert died.code == -signal.SIGKILL
    assert file.read_text() == old
    assert list(folder.glob("*.prom")) == [file]


@real
def test_a_file_that_cannot_be_written(shared: Lab) -> None:
    none, folder = shared.name("none"), shared.name("full")
    assert_clear(shared.blktrack("metrics", "--output", none / "x.prom"), 2, "is no folder")
    assert_clear(shared.blktrack("metrics", "--output", none), 2, "not named *.prom")
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder)
    try:
        done = shared.blktrack("metrics", "--output", folder / "x.prom")
        assert_clear(done, 1, "No space left on device")
        assert list(folder.iterdir()) == []
    finally:
        run("umount", folder)
