"""What a JSON value has to be, written down: keys, types, words, null or not.

A dict has exactly these keys, a list elements that are all alike, a set is of the words that may
stand there, None is null, `number` any number, a tuple one of several. All else is equal.
"""

from __future__ import annotations

from typing import Any

number = (int, float)
Schema = Any


def faults(value: Any, schema: Schema, where: str = "") -> list[str]:
    """How the value is not as the schema says, a line each."""
    match schema:
        case dict():
            if not isinstance(value, dict):
                return [f"{where}: {value!r} is no object"]
            found = [f"{where}.{key} is missing" for key in schema.keys() - value.keys()]
            found += [f"{where}.{key} is new" for key in value.keys() - schema.keys()]
            for key in schema.keys() & value.keys():
                found += faults(value[key], schema[key], f"{where}.{key}")
            return sorted(found)
        case list():
            if not isinstance(value, list):
                return [f"{where}: {value!r} is no list"]
            if not schema:
                return [f"{where}: {value!r} is not empty"] if value else []
            if not value:
                return [f"{where} is empty"]
            return [fault for each in value for fault in faults(each, schema[0], f"{where}[]")]
        case tuple():
            return (
                [] if any(not faults(value, one) for one in schema) else _no(value, schema, where)
            )
        case set():
            fits = value in schema
        case type():
            fits = type(value) is schema
        case _:
            fits = value == schema and type(value) is type(schema)
    return [] if fits else _no(value, schema, where)


def _no(value: Any, schema: Schema, where: str) -> list[str]:
    return [f"{where}: {value!r} is not {schema}"]


# The reports.

CONSISTENCY = {"none", "crash", "filesystem"}
PAST = {"reason": str, "time": number}
POINT = {"epoch": int, "point": number, "consistency": CONSISTENCY}
NO_POINT = {"epoch": None, "point": None, "consistency": None}
EXTENTS = [[int]]  # of two

LAST_RUN = {
    "begun": number,
    "duration_s": number,
    "exit": int,
    "error": str,
    "mode": str,
    "bytes_shipped": int,
    "bytes_wire": int,
    "rate": (number, None),
}
LINK_READY = {
    "target": str,
    "name": str,
    **POINT,
    "lag_s": number,
    "pending_bytes": int,
    "state": "ready",
    "reason": "",
    "rpo_s": None,  # without a policy
    "lateness": "",
    "resyncs": [],
    "route": "",  # of this host
    "held_bytes": None,
    "last_run": (LAST_RUN, None),  # none, if they were killed
    "last_error": None,
}
LINK_ELSEWHERE = LINK_READY | {"route": str, "held_bytes": int, "last_error": (PAST, None)}
LINK_INITIAL = LINK_READY | NO_POINT | {"state": "initial", "lag_s": None}
LINK_RESYNC = LINK_READY | {"state": "resync", "reason": str, "pending_bytes": (int, None)}
LINK_UNFINISHED = LINK_INITIAL | {"state": "unfinished", "reason": str, "epoch": int}
DEVICE = {
    "device": str,
    "size": int,
    "granularity": int,
    "state": "tracking",
    "reason": "",
    "since": number,
    "generation": str,
    "epoch": int,
    "dirty_bytes": int,
    "written_bytes": int,
    "writes": int,
    "losses": int,
    "doubts": [],
    "links": [LINK_READY],
}
UNKNOWN = {"reason": str, "since": None, "epoch": 0, "dirty_bytes": 0, "written_bytes": 0}
DEVICE_GAP = (
    DEVICE | UNKNOWN | {"state": "gap", "since": number, "generation": "", "doubts": [PAST]}
)
DEVICE_STOPPED = DEVICE | UNKNOWN | {"state": "stopped"}
DEVICE_ABSENT = DEVICE | UNKNOWN | {"state": "absent"}
REPLICA = {
    "target": str,
    "source": str,
    "link": str,
    "state": "ready",
    "reason": "",
    **POINT,
    "next_epoch": None,
    "next_point": None,
}
REPLICA_CHANGED = REPLICA | {"state": "changed", "reason": str}
REPLICA_UNFINISHED = REPLICA | NO_POINT | {"state": "unfinished", "reason": str}
REPLICA_APPLYING = REPLICA | {"state": "applying", "reason": str}
REPLICA_WAITING = REPLICA | {
    "state": "waiting", "reason": str, "next_epoch": int, "next_point": number,
}  # fmt: skip
SHIPPED = {
    **POINT,
    "reason": "",
    "rounds": int,
    "extents": int,
    "bytes_changed": int,
    "bytes_shipped": int,
    "bytes_zeroed": int,
    "bytes_wire": int,
    "freeze_s": number,
    "duration_s": number,
}
SYNC = {"mode": str, **SHIPPED}
SEND = {"link": str, "mode": str, "base": int, **SHIPPED}
TOTALS = {
    "runs": int,
    "busy": int,
    "failures": int,
    "failures_in_a_row": int,
    "resyncs": int,
    "rounds": int,
    "bytes_changed": int,
    "bytes_shipped": int,
    "bytes_zeroed": int,
    "bytes_wire": int,
    "freeze_s": number,
    "last_freeze_s": number,
    "succeeded": (number, None),
}
RUN = {
    **SYNC,
    "command": {"sync", "send"},
    "link": str,
    "target": str,
    "begun": number,
    "exit": 0,
    "error": "",
    "totals": TOTALS,
}
RUN_FAILED = RUN | NO_POINT | {"mode": "", "consistency": "", "exit": int, "error": str}
HISTORY = {"device": str, "runs": [RUN], "damaged": int}
COMMIT = {"link": str, **POINT}
RECV = {
    "target": str,
    "link": str,
    "source": str,
    "mode": {"initial", "incremental"},
    **POINT,
    "extents": int,
    "bytes_changed": int,
    "bytes_shipped": int,
    "bytes_zeroed": int,
    "bytes_wire": int,
    "duration_s": number,
}
LISTED = {
    "device": str,
    "granularity": int,
    "generation": str,
    "epoch": int,
    "bytes": int,
    "extents": EXTENTS,
}
VERIFY = {"bytes_compared": int, "bytes_different": int, "bytes_repaired": int, "extents": EXTENTS}
TRACK = {
    "device": str,
    "size": int,
    "granularity": int,
    "generation": str,
    "began": bool,
    "kernel_bytes": int,
    "warnings": [],
}
ACTION = {"device": str, "action": str, "reason": "", "hint": ""}
DOCTOR = {
    "ok": bool,
    "kernel": str,
    "checks": [{"name": str, "ok": bool, "detail": str, "remedy": str}],
    "probe": None,
}
PROBED = {"name": str, "result": str, "reason": str}
PROBE = {
    "ok": True,
    "duration_s": float,
    "kinds": [{"kind": str, "based": str, "verdict": str, "reason": str, "probes": [PROBED]}],
}
FINDING = {"key": str, "message": str, "hint": str}
POLICY = {
    "file": str,
    "ok": True,
    "devices": int,
    "replicas": int,
    "errors": [],
    "warnings": [FINDING],
}
OUTCOME = {
    "device": str,
    "name": str,
    "target": str,
    "exit": 0,
    "error": "",
    "hint": "",
    "report": SYNC,
    "warnings": [],
    "point": number,
    "lag_s": number,
    "rpo_s": number,
    "lateness": {"ok", "late", "broken"},
}
OUTCOME_FAILED = OUTCOME | {"exit": int, "error": str, "hint": str, "report": None}
FLEET = {"links": [OUTCOME], "exit": 0, "duration_s": number}
TOP_LINK = {
    "target": str,
    "name": str,
    "state": "ready",
    "reason": "",
    **POINT,
    "lag_s": number,
    "rpo_s": None,
    "lateness": "",
    "pending_bytes": int,
    "sync_rate": number,
    "eta_s": number,
    "route": "",
    "failed": None,
}
TOP_DEVICE = {
    "device": str,
    "size": int,
    "granularity": int,
    "state": "tracking",
    "reason": "",
    "generation": str,
    "epoch": int,
    "write_rate": number,
    "writes_rate": number,
    "dirty_rate": number,
    "dirty_bytes": int,
    "written_bytes": int,
    "writes": int,
    "losses": int,
    "cost_ns": (number, None),
    "heat": [number],
    "links": [TOP_LINK],
}
TOP = {
    "time": number,
    "interval_s": number,
    "programs_share": (number, None),
    "devices": [TOP_DEVICE],
}
