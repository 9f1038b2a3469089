"""The keys of every report, with their types and what may be null: scripts are written to them."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from blktrack.cli import parsers
from blktrack.units import MIB
from tests.blockdev import Done, Lab, detach
from tests.schema import (
    ACTION,
    COMMIT,
    DEVICE,
    DEVICE_ABSENT,
    DEVICE_GAP,
    DEVICE_STOPPED,
    DOCTOR,
    FINDING,
    FLEET,
    HISTORY,
    LINK_INITIAL,
    LINK_READY,
    LINK_RESYNC,
    LINK_UNFINISHED,
    LISTED,
    OUTCOME_FAILED,
    PAST,
    POLICY,
    RECV,
    REPLICA,
    REPLICA_APPLYING,
    REPLICA_CHANGED,
    REPLICA_UNFINISHED,
    REPLICA_WAITING,
    RUN_FAILED,
    SEND,
    SYNC,
    TOP,
    TRACK,
    VERIFY,
    Schema,
    faults,
    number,
)
from tests.streams import LINK, Hosts
from tests.test_events import change, filled, identical

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 4 * MIB

# As the contract lists them; what is more may be new, what is less or another breaks scripts.
PROMISED: list[tuple[Schema, str]] = [
    (
        DEVICE,
        "device size granularity state reason generation epoch dirty_bytes written_bytes writes"
        " losses links",
    ),
    (LINK_READY, "target name epoch point consistency lag_s pending_bytes state"),
    (
        SYNC,
        "mode reason consistency epoch point rounds extents bytes_changed bytes_shipped bytes_wire"
        " freeze_s duration_s",
    ),
    (LISTED, "device granularity generation epoch bytes extents"),
    (VERIFY, "bytes_compared bytes_different extents"),
]
HAVE_JSON = {
    "doctor", "track", "status", "extents", "sync", "send", "recv", "verify", "config", "start",
    "stop", "history", "top",
}  # fmt: skip


def told(done: Done, code: int = 0) -> Any:
    assert done.code == code, done
    return json.loads(done.out)


def fits(value: Any, schema: Schema) -> None:
    assert faults(value, schema) == []


def test_the_schemas_hold_what_was_promised() -> None:
    for schema, keys in PROMISED:
        assert set(keys.split()) <= schema.keys()


def test_no_report_is_missing_here() -> None:
    commands = parsers().subparsers.items()
    known = {
        name
        for name, parser in commands
        for one in parser.walk()
        if any("--json" in action.option_strings for action in one.arguments)
    }
    assert known == HAVE_JSON


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"a": 1}, ""),
        ({"a": True}, "is not"),
        ({"a": None}, "is not"),
        ({"a": 1, "b": 1}, ".b is new"),
        ({}, ".a is missing"),
        ([], "is no object"),
    ],
)
def test_a_fault_is_found(value: Any, fault: str) -> None:
    found = faults(value, {"a": int})
    assert bool(found) == bool(fault) and fault in "".join(found)


def test_tracking_and_syncs(shared: Lab) -> None:
    device, replica = filled(shared, SIZE), shared.name("replica")

    def run(*words: str | Path, code: int = 0, **env: str) -> Any:
        return told(shared.blktrack(*words, "--json", env=env), code)

    for began in (True, False):
        fits(run("track", device), TRACK | {"began": began})
    fits(run("sync", device, replica), SYNC | {"mode": "initial"})
    fits(run("sync", device, replica), SYNC | {"mode": "nothing"})
    fits(run("extents", device), LISTED | {"extents": []})
    change(device, MIB)
    for words in ((device,), (device, "--target", replica)):
        fits(run("extents", *words), LISTED)
    fits(run("sync", device, replica), SYNC | {"mode": "incremental"})
    fits(run("verify", device, replica), VERIFY | {"extents": [], "bytes_different": 0})
    with replica.open("r+b") as file:
        file.write(b"changed")
    fits(run("verify", device, replica, code=5), VERIFY)
    fits(run("sync", device, replica), SYNC | {"mode": "resync", "reason": str})
    with replica.open("r+b") as file:
        file.write(b"changed")
    fits(run("verify", device, replica, "--repair"), VERIFY)
    assert identical(device, replica)


def test_history(shared: Lab) -> None:
    device, foreign = filled(shared, SIZE), shared.name("foreign")
    shared.track(device)
    shared.sync(device, shared.name("replica"))
    fits(told(shared.blktrack("history", device, "--json")), HISTORY)
    foreign.write_bytes(b"x" * MIB)
    assert shared.blktrack("sync", device, foreign).code == 1
    failed = HISTORY | {"runs": [RUN_FAILED]}
    fits(told(shared.blktrack("history", device, "--failed", "--json")), failed)


def test_live_figures(shared: Lab) -> None:
    device = filled(shared, SIZE)
    shared.track(device)
    assert shared.blktrack("sync", device, shared.name("replica")).code == 0
    change(device, MIB)
    fits(told(shared.blktrack("top", device, "--once", "--interval", "0.2", "--json")), TOP)


def test_devices_and_links(shared: Lab) -> None:
    file = shared.name("disk")
    device, replica = shared.loop(SIZE, file=file), shared.name("replica")
    shared.track(device)

    def status(name: str | Path = device, **env: str) -> Any:
        return told(shared.blktrack("status", name, "--json", env=env))

    def of_device(schema: Schema, **env: str) -> None:
        fits(status(**env), {"devices": [schema], "replicas": []})

    of_device(DEVICE | {"links": []})
    shared.blktrack("sync", device, replica, env={"BLKTRACK_CRASH": "ship-begun"})
    of_device(DEVICE | {"links": [LINK_INITIAL]})
    fits(status(replica)["replicas"], [REPLICA_UNFINISHED])
    shared.sync(device, replica)
    of_device(DEVICE)
    fits(status(replica), {"devices": [], "replicas": [REPLICA]})
    change(device, MIB)
    words = ("sync", device, replica, "--in-place")
    shared.blktrack(*words, env={"BLKTRACK_CRASH": "ship-begun"})
    of_device(DEVICE | {"links": [LINK_UNFINISHED]})
    fits(status(replica)["replicas"], [REPLICA_APPLYING])
    shared.sync(device, replica)
    change(device, MIB)
    shared.blktrack("sync", device, replica, env={"BLKTRACK_CRASH": "stage-sealed"})
    with replica.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # or it would be brought to where it leads
        fits(status(replica)["replicas"], [REPLICA_WAITING])
    shared.sync(device, replica)
    with replica.open("r+b") as opened:
        opened.write(b"changed")
    of_device(DEVICE | {"links": [LINK_RESYNC]})
    fits(status(replica)["replicas"], [REPLICA_CHANGED])
    shared.sync(device, replica)
    of_device(DEVICE | {"links": [LINK_READY | {"resyncs": [PAST]}]})
    past = LINK_READY | {"resyncs": [PAST]}
    assert shared.blktrack("stop", device).code == 0
    of_device(DEVICE_STOPPED | {"links": [past | {"pending_bytes": None}]})
    assert shared.blktrack("start", device).code == 0
    of_device(DEVICE_GAP | {"links": [LINK_RESYNC | {"resyncs": [PAST]}]}, BLKTRACK_BOOT_ID="next")
    detach(device, file)
    absent = {"links": [LINK_RESYNC | {"resyncs": [PAST]}], "doubts": [PAST], "generation": ""}
    of_device(DEVICE_ABSENT | absent)


def test_streams(shared: Lab) -> None:
    hosts = Hosts(shared, SIZE)
    for mode in ("initial", "nothing", "incremental", "resync"):
        env = {"BLKTRACK_BOOT_ID": "next"} if mode == "resync" else {}
        if mode == "incremental":
            hosts.change(MIB)
        delta, said = hosts.send(env=env)
        whole = {"base": None} if mode in ("initial", "resync") else {}
        reason = {"reason": str if mode == "resync" else ""}
        fits(json.loads(said.err), SEND | whole | reason | {"mode": mode})
        received = told(hosts.recv(delta))
        fits(received, RECV | {"mode": "initial" if whole else "incremental"})
        words = ("send", hosts.source, "--link", LINK, "--commit", str(received["epoch"]))
        fits(told(shared.blktrack(*words, "--json", env=env)), COMMIT)


def test_boot_and_shutdown(shared: Lab) -> None:
    file = shared.name("disk")
    device = shared.loop(SIZE, file=file)
    shared.track(device)

    def run(command: str, code: int = 0, env: dict[str, str] | None = None) -> Any:
        (found,) = told(shared.blktrack(command, device, "--json", env=env), code)["devices"]
        return found

    fits(run("start"), ACTION | {"action": "tracking"})
    fits(run("stop"), ACTION | {"action": "stopped"})
    fits(run("stop"), ACTION | {"action": "stopped", "reason": str})
    fits(run("start"), ACTION | {"action": "resumed"})
    with open(device, "rb"):
        fits(run("stop", 6), ACTION | {"action": "in use", "reason": str, "hint": str})
    boot = {"BLKTRACK_BOOT_ID": "next"}
    fits(run("stop", env=boot), ACTION | {"action": "gap", "reason": str})
    fits(run("start", env=boot), ACTION | {"action": "began", "reason": str})
    detach(device, file)
    for command, code in (("start", 1), ("stop", 0)):
        fits(run(command, code), ACTION | {"action": "absent", "reason": str, "hint": str})


def test_doctor(shared: Lab) -> None:
    fits(told(shared.blktrack("doctor", "--json")), DOCTOR)


def policy(lab: Lab, device: str, *targets: str | Path) -> Path:
    file = lab.store.paths.policy
    replicas = "".join(
        f'[device.one.replica.r{number}]\ntarget = "{target}"\nrpo = "1h"\n'
        for number, target in enumerate(targets)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'[device.one]\npath = "{device}"\n{replicas}', encoding="utf-8")
    lab.stack.callback(file.unlink, missing_ok=True)
    return file


def test_policy_and_fleet(shared: Lab) -> None:
    device, replica = filled(shared, SIZE), shared.name("replica")
    file = policy(shared, device, replica)
    fits(told(shared.blktrack("config", "check", "--json")), POLICY)
    fits(told(shared.blktrack("sync", "--all", "--json")), FLEET)
    (found,) = shared.blktrack("status", device, "--json").json["devices"]
    fits(found, DEVICE | {"links": [LINK_READY | {"rpo_s": number, "lateness": "ok"}]})
    policy(shared, device, replica, "/nowhere/replica")
    failed = told(shared.blktrack("sync", "--all", "--json"), 1)
    fits(failed | {"links": failed["links"][:1]}, FLEET | {"exit": 1})
    never = {"point": None, "lag_s": None, "lateness": "broken"}
    fits(failed["links"][1], OUTCOME_FAILED | never)
    file.write_text("[device.one]\n", encoding="utf-8")
    wrong = {"ok": False, "errors": [FINDING], "warnings": []}
    fits(told(shared.blktrack("config", "check", "--json"), 2), POLICY | wrong)
