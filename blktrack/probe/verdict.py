"""What the quick probes said of a kernel, remembered so that each kernel is asked once.

    LIB/probe.json    what failed, by kernel (release and build), blktrack and its programs

A file that is damaged or of another format is one that is not there: it is found out anew.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blktrack import __version__, durable
from blktrack.bpf import install
from blktrack.bpf.compile import fingerprint
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Interrupted, Refused
from blktrack.observer import NOBODY, Observer
from blktrack.probe import battery
from blktrack.probe.devices import KINDS, Kind
from blktrack.probe.probes import PROBES
from blktrack.report import ProbedKind
from blktrack.state import DeviceState, Store
from blktrack.sysfs import BlockDevice

_FORMAT, _FILE = 1, "probe.json"
_KEPT = 8  # kernels
_VERSION = Path("/proc/sys/kernel/version")
_QUICK = [probe for probe in PROBES if probe.quick]


def this_kernel() -> dict[str, str]:
    """What a verdict holds for."""
    build = _VERSION.read_text(encoding="utf-8", errors="replace").strip()
    return {
        "release": os.uname().release,
        "build": build,
        "blktrack": __version__,
        "programs": fingerprint(),
    }


def check(
    store: Store,
    device: BlockDevice,
    observer: Observer = NOBODY,
    stop: Callable[[], None] = battery.never,
    *,
    hand_on: bool = False,
) -> str:
    """Refused if this kernel does not show all changes of such a device.

    Returns why that could not be found out; "" if it shows them all. What `stop` raises is raised.

    hand_on -- programs that were loaded for it may stay attached, for tracking that begins now; if
        it does not after all, `drop_unused` takes them away.
    """
    try:
        with _lock(store.paths, observer):
            return _check(store, device, observer, stop, hand_on)
    except (Interrupted, Refused):
        raise
    except (BlktrackError, OSError) as error:
        return str(error)


def check_anew(
    store: Store, state: DeviceState, device: BlockDevice, observer: Observer = NOBODY
) -> None:
    """For a device that was tracked on another kernel, before it is on this. Refused as `check`."""
    if state.release == os.uname().release:
        return
    if unknown := check(store, device, observer):
        observer.warn(not_probed(unknown))


def not_probed(why: str) -> str:
    """A warning."""
    return (
        f"whether this kernel shows all changes could not be probed: {why}; tracking goes on, and "
        "notices what it can"
    )


def _check(
    store: Store, device: BlockDevice, observer: Observer, stop: Callable[[], None], hand_on: bool
) -> str:
    paths, reasons = store.paths, []
    kinds = _read(paths)

    def keep(pins: Path) -> None:
        with _programs(store):
            install.hand_over(pins, paths.pins)

    for kind in _like(device):
        failed = kinds.get(kind.name)
        if failed is None:
            (found,) = battery.run([kind], _QUICK, observer, stop, keep if hand_on else None).kinds
            if found.verdict == battery.NOT_PROBED:
                reasons.append(found.reason)
                continue
            failed = _failed(found)
            _write(paths, {**kinds, kind.name: failed})
        if failed:
            raise Refused(
                f"{device.path}: this kernel, {os.uname().release}, does not show all changes of "
                f"such a device; on a scratch {kind.name} device: {failed}",
                hint="blktrack doctor --probe shows more, and tries again; if it finds the same, "
                "boot another kernel",
            )
        return ""
    return "; ".join(reasons)


def remember(paths: Paths, kinds: list[ProbedKind]) -> None:
    """In place of what was known of these."""
    new = {kind.kind: _failed(kind) for kind in kinds if kind.verdict != battery.NOT_PROBED}
    with _lock(paths, NOBODY):
        _write(paths, {**_read(paths), **new})


def _like(device: BlockDevice) -> list[Kind]:
    """The kinds whose verdict holds for a device, the most alike first."""
    based = "request" if device.request_based else "bio"
    name = device.disk.name
    # Whatever is stacked on others is most like device-mapper.
    first = next((kind.name for kind in KINDS if name.startswith(kind.name)), "dm")
    found = [kind for kind in reversed(KINDS) if kind.based == based]
    return sorted(found, key=lambda kind: kind.name != first)


def _failed(kind: ProbedKind) -> str:
    """What of it failed and why; "" if nothing did."""
    failed = [probe for probe in kind.probes if probe.result == battery.FAILED]
    return "; ".join(f"{probe.name}: {probe.reason}" for probe in failed)


def drop_unused(store: Store) -> None:
    """Take programs away that no device needs."""
    with _programs(store):
        install.drop_unused(store.paths.pins)


def _programs(store: Store) -> contextlib.AbstractContextManager[None]:
    return durable.lock(store.kernel_lock, what="the tracking programs", wait=30)


def _lock(paths: Paths, observer: Observer) -> contextlib.AbstractContextManager[None]:
    return durable.lock(paths.run / "probe.lock", what="the probe", wait=30, observer=observer)


def _read(paths: Paths) -> dict[str, str]:
    """What failed, by kind, on this kernel."""
    kernel = this_kernel()
    for entry in _entries(paths):
        if entry["kernel"] == kernel:
            return dict(entry["failed"])
    return {}


def _entries(paths: Paths) -> list[dict[str, Any]]:
    try:
        raw = durable.read_json(paths.lib / _FILE) or {}
    except BlktrackError:
        return []
    return list(raw["kernels"]) if raw.get("format") == _FORMAT else []


def _write(paths: Paths, failed: dict[str, str]) -> None:
    kernel = this_kernel()
    others = [entry for entry in _entries(paths) if entry["kernel"] != kernel]
    entry = {"kernel": kernel, "time": time.time(), "failed": failed}
    kernels = [*others, entry][-_KEPT:]
    durable.write_json(paths.lib / _FILE, {"format": _FORMAT, "kernels": kernels})
