"""A replica on another host in `status`: what is told of it is what the last run knew, so that
nobody waits for a network. Its keeper runs here, over pipes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blktrack import crash, history, metrics
from blktrack.bpf import install
from blktrack.cli import main
from blktrack.config import Paths
from blktrack.errors import BlktrackError
from blktrack.observer import NOBODY
from blktrack.options import Options
from blktrack.report import Run, SyncReport
from blktrack.ship.diagnosis import ConnectionFailed
from blktrack.state import DeviceState, LinkState, Store
from blktrack.sync import sync
from blktrack.units import KIB, MIB
from tests.background import assert_clear
from tests.blockdev import Lab
from tests.farside import pipe
from tests.schema import LINK_ELSEWHERE, NO_POINT, PAST, TOP_LINK, faults
from tests.test_events import change, filled, identical
from tests.test_metrics import samples, value

pytestmark = pytest.mark.needs("root", "loop", "bpf")

SIZE = 4 * MIB
UNREACHABLE = "/bin/sh -c 'echo ssh: connect to host: No route to host >&2; exit 255' ssh"
READY = LINK_ELSEWHERE
UNFINISHED = READY | NO_POINT | {"state": "unfinished", "lag_s": None, "reason": str, "epoch": int}


@dataclass
class Pair:
    """A source here and its replica, which the keeper says to be on this very host."""

    lab: Lab
    source: str
    replica: Path
    target: str

    def sync(self, *, retry_for: float = 0.0, **asked: Any) -> SyncReport:
        options = Options(consistency="none", retry_for=retry_for, **asked)
        return sync(self.lab.store, self.source, self.target, options, NOBODY)[0]

    @property
    def number(self) -> str:
        """Of the device."""
        states = self.lab.store.devices()
        return next(state.id for state in states if state.path == self.source)

    def fails_at(self, place: str, **asked: Any) -> None:
        """A sync that gets no further than to this crash point."""

        def point(name: str) -> None:
            if name == place:
                raise BlktrackError(f"no further than {name}")

        with pytest.MonkeyPatch.context() as patch, pytest.raises(BlktrackError, match="no furth"):
            patch.setattr(crash, "point", point)
            self.sync(**asked)


@pytest.fixture
def pair(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> Pair:
    far = shared.name("far")
    far.mkdir()
    monkeypatch.setenv("BLKTRACK_SSH", pipe(far))
    source = filled(shared, SIZE)
    shared.track(source)
    return Pair(shared, source, far / "replica.img", f"ssh://localhost{far}/replica.img")


def status(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the link; who tries to reach the other host fails."""
    with monkeypatch.context() as patch:
        patch.setenv("BLKTRACK_SSH", "/nowhere/ssh")
        (found,) = pair.lab.status(pair.source)["links"]
    assert isinstance(found, dict)
    return found


def test_the_last_run_and_what_is_pending(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pair.sync()
    change(pair.source, MIB)
    found = status(pair, monkeypatch)
    assert faults(found, READY | {"last_error": None}) == []
    assert found["point"] == report.point and found["pending_bytes"] == 64 * KIB
    run = found["last_run"]
    assert (run["mode"], run["bytes_wire"]) == ("initial", report.bytes_wire)
    assert run["rate"] == pytest.approx(report.bytes_wire / run["duration_s"])
    assert found["route"].endswith("dev lo") and found["held_bytes"] == 0
    text = pair.lab.blktrack("status", pair.source, env={"BLKTRACK_SSH": "/nowhere/ssh"}).out
    assert f"-> {pair.target}  ready, at " in text and "64 KiB pending" in text
    assert f"route {found['route']}\n" in text and "over the network at" in text
    pair.sync()
    pair.sync()
    run = status(pair, monkeypatch)["last_run"]
    assert run["mode"] == "nothing" and run["rate"] is None and run["bytes_wire"] > 0
    assert identical(pair.source, pair.replica)


def test_the_last_error_and_its_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    point = pair.sync().point
    with monkeypatch.context() as patch, pytest.raises(ConnectionFailed) as caught:
        patch.setenv("BLKTRACK_SSH", UNREACHABLE)
        pair.sync()
    failed = status(pair, monkeypatch)
    assert faults(failed, READY | {"last_error": PAST}) == []
    assert failed["last_error"]["reason"] == str(caught.value) == failed["last_run"]["error"]
    run = failed["last_run"]
    assert failed["last_error"]["time"] == pytest.approx(run["begun"] + run["duration_s"])
    assert (failed["state"], failed["point"], run["rate"]) == ("ready", point, None)
    text = pair.lab.blktrack("status", pair.source).out
    assert ": failed, " in text and f": {caught.value}\n" in text
    change(pair.source, MIB)
    pair.sync()
    after = status(pair, monkeypatch)
    assert after["last_run"]["error"] == "" and after["last_error"] == failed["last_error"]


def test_what_is_there_already(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.sync()
    change(pair.source, MIB)
    pair.fails_at("sealing-recorded")
    found = status(pair, monkeypatch)
    assert faults(found, READY | {"reason": str}) == []
    assert found["reason"].endswith("and has not said that it did") and found["point"] is not None
    assert found["held_bytes"] == found["pending_bytes"] == 64 * KIB
    change(pair.source, MIB, 16 * KIB, number=2)
    found = status(pair, monkeypatch)
    assert (found["held_bytes"], found["pending_bytes"]) == (48 * KIB, 64 * KIB)
    assert "48 KiB of it there already" in pair.lab.blktrack("status", pair.source).out
    pair.sync()
    assert faults(found := status(pair, monkeypatch), READY) == [] and found["held_bytes"] == 0
    assert identical(pair.source, pair.replica)


def test_at_no_point(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.sync()
    change(pair.source, MIB)
    pair.fails_at("ship-begun", in_place=True)
    found = status(pair, monkeypatch)
    assert faults(found, UNFINISHED) == [] and "increment is half in it" in found["reason"]
    assert pair.sync().mode == "incremental" and identical(pair.source, pair.replica)
    assert faults(status(pair, monkeypatch), READY) == []
    pair.fails_at("away-recorded", full=True)
    found = status(pair, monkeypatch)
    assert faults(found, UNFINISHED) == [] and "full copy of it has not ended" in found["reason"]
    assert pair.sync().mode == "initial"
    assert faults(status(pair, monkeypatch), READY) == []


def test_a_resync_under_way(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.sync()
    pair.replica.write_bytes(b"changed")
    assert status(pair, monkeypatch)["state"] == "ready"  # nobody has looked there yet
    pair.fails_at("ship-begun")
    found = status(pair, monkeypatch)
    resync = UNFINISHED | {"state": "resync", "resyncs": [PAST]}
    assert faults(found, resync) == [] and "not as it was left" in found["reason"]
    assert pair.sync().mode == "resync" and identical(pair.source, pair.replica)
    assert faults(status(pair, monkeypatch), READY | {"resyncs": [PAST]}) == []


def test_few_lines_of_a_long_history_are_parsed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.sync()
    path = pair.lab.store.lib(pair.number) / "history.jsonl"
    line = path.read_text(encoding="ascii")
    with path.open("a", encoding="ascii") as file:
        file.write(line.replace("replica.img", "other.img") * 2000)
        file.write(line)
    parsed: list[bytes] = []
    parse = history._parse

    def counted(line: bytes) -> Run | None:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(history, "_parse", counted)
    assert status(pair, monkeypatch)["last_run"]["mode"] == "initial"
    assert len(parsed) < 5


def test_a_target_elsewhere_is_asked_for_there(shared: Lab) -> None:
    done = shared.blktrack("status", "ssh://vault/backup/a%20b.img")
    assert_clear(done, 2, "is on another host", "blktrack status '/backup/a b.img' on vault")


def test_a_history_that_cannot_be_read_hides_nothing_else(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any, **__: Any) -> None:
        raise BlktrackError("cannot read it")

    pair.sync()
    monkeypatch.setattr(history, "latest", unreadable)
    found = status(pair, monkeypatch)
    assert (found["state"], found["last_run"], found["last_error"]) == ("ready", None, None)


def test_in_top(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pair.sync()
    change(pair.source, MIB)
    with monkeypatch.context() as patch, pytest.raises(ConnectionFailed):
        patch.setenv("BLKTRACK_SSH", UNREACHABLE)
        pair.sync()
    monkeypatch.setenv("BLKTRACK_SSH", "/nowhere/ssh")
    words = ("top", pair.source, "--once", "--interval", "0.1", "--json")
    (found,) = pair.lab.blktrack(*words).json["devices"][0]["links"]
    assert faults(found, TOP_LINK | {"route": str, "failed": PAST}) == []
    assert (found["target"], found["point"]) == (pair.target, report.point)
    assert found["pending_bytes"] == 64 * KIB and found["route"].endswith("dev lo")
    assert found["eta_s"] == pytest.approx(64 * KIB / found["sync_rate"])
    assert "No route to host" in found["failed"]["reason"]


def test_in_metrics(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.sync()
    change(pair.source, MIB)
    pair.fails_at("sealing-recorded")
    monkeypatch.setenv("BLKTRACK_SSH", "/nowhere/ssh")
    found = samples(metrics.collect(pair.lab.store).text.decode())

    def of_link(name: str, **more: str) -> float | None:
        return value(found, f"link_{name}", device=pair.source, target=pair.target, **more)

    assert of_link("state", state="ready") == 1
    assert of_link("pending_bytes") == of_link("held_bytes") == 64 * KIB
    assert of_link("last_failure_timestamp_seconds") == of_link("last_run_timestamp_seconds")
    runs = history.read(pair.lab.store, pair.number).runs
    assert of_link("wire_bytes_total") == sum(run.bytes_wire for run in runs)
    assert all(run.bytes_wire for run in runs) and runs[-1].exit == 1


def test_by_what_it_is_called(pair: Pair) -> None:
    """A link has its name of file and host; what takes it takes any way to write the address."""
    pair.sync()
    (link,) = pair.lab.status(pair.source)["links"]
    assert link["name"] == "replica.img@localhost"
    other = "SSH://" + pair.target.removeprefix("ssh://").replace("/replica", "/./replic%61")
    for name in (pair.target, other, link["name"]):
        assert pair.lab.blktrack("extents", pair.source, "--target", name).code == 0
        told = pair.lab.blktrack("history", pair.source, "--target", name)
        assert told.code == 0 and ".img@localhost initial" in told.out
    assert pair.lab.blktrack("history", pair.source, "--target", "ssh://localhost/x").code == 2


def test_doctor_looks_for_ssh_where_there_is_such_a_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLKTRACK_ROOT", str(tmp_path))
    monkeypatch.setattr(install, "probe", lambda: None)  # it takes seconds

    def told() -> list[tuple[bool, str, str]]:
        main(["doctor", "--json"])
        checks = json.loads(capsys.readouterr().out)["checks"]
        return [(c["ok"], c["detail"], c["remedy"]) for c in checks if c["name"] == "ssh"]

    assert told() == []
    monkeypatch.setenv("BLKTRACK_SSH", "/nowhere/ssh")
    store = Store(Paths.from_environment())
    store.save_device(DeviceState("one", "/dev/blktrack-none", ""))
    store.save_link("one", LinkState("link", "far", "/near"))
    assert told() == []
    policy = '[device.a]\npath = "/dev/vg/a"\n[device.a.replica.b]\ntarget = "ssh://h/x"\n'
    store.paths.policy.parent.mkdir(parents=True)
    store.paths.policy.write_text(policy, encoding="utf-8")
    assert [ok for ok, *_ in told()] == [False]
    store.paths.policy.write_text("", encoding="utf-8")
    store.save_link("one", LinkState("link", "far", "ssh://h/x"))
    ((ok, detail, remedy),) = told()
    assert not ok and "no /nowhere/ssh on this host" in detail and "openssh-client" in remedy
    monkeypatch.setenv("BLKTRACK_SSH", "/bin/false")
    assert [ok for ok, *_ in told()] == [True]
