"""Say what this host can do, each failure with its remedy. Exit code 1 if anything fails.

With --probe, changes of every sort are made to scratch devices in memory, of each kind that is to
be had, and whether tracking sees all of them: which kinds can be trusted on this kernel.

blktrack doctor
blktrack doctor --probe
"""

from __future__ import annotations

import argparse
import contextlib
import os

from blktrack import doctor
from blktrack.bpf import install
from blktrack.cli.common import add_json, deferring, emit, paths, store
from blktrack.cli.progress import Watcher
from blktrack.errors import BlktrackError
from blktrack.observer import Observer
from blktrack.policy import read
from blktrack.probe import battery, verdict
from blktrack.probe.probes import PROBES
from blktrack.report import DoctorReport, ProbeReport
from blktrack.ship.address import is_remote


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe",
        action="store_true",
        help="change scratch devices of every kind and see whether this kernel shows all of it",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with Watcher(quiet=False) as watcher:
        watcher.phase("trying out what this host can do", 0)
        elsewhere = _has_replicas_elsewhere()
        report = _probed(elsewhere, watcher) if args.probe else _examined(elsewhere)
    if args.json:
        emit(report)
        return 0 if report.ok else 1
    for check in report.checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:9} {check.detail}")
        if not check.ok:
            print(f"      {'':9} -> {check.remedy}")
    if report.probe:
        print()
        _show(report.probe)
    elif args.probe:
        print("\nnothing was probed, as tracking cannot work here")
    return 0 if report.ok else 1


def _examined(elsewhere: bool) -> DoctorReport:
    return doctor.examine(paths(), elsewhere=elsewhere)


def _probed(elsewhere: bool, observer: Observer) -> DoctorReport:
    """The programs are loaded once for both: it is what takes longest."""
    found: list[ProbeReport] = []

    def probe() -> None:
        probed = battery.run(observer=observer, stop=stop)
        if all(kind.verdict == battery.NOT_PROBED for kind in probed.kinds):
            install.probe()
        found.append(probed)

    with deferring("the probe", "nothing is left of it") as stop:
        report = doctor.examine(paths(), elsewhere=elsewhere, programs=probe)
    if found:
        (report.probe,) = found
        report.ok = report.ok and report.probe.ok
        if os.access(paths().lib, os.W_OK):  # else that is told as well
            verdict.remember(paths(), report.probe.kinds)
    return report


def _show(report: ProbeReport) -> None:
    """A row for each probe, a column for each kind; then what follows for the kind."""
    words = {battery.PASSED: "passed", battery.FAILED: "FAILED", battery.ABSENT: "-"}
    print(_row("", [kind.kind for kind in report.kinds]))
    for number, probe in enumerate(PROBES):
        print(_row(probe.told, [words[kind.probes[number].result] for kind in report.kinds]))
    print()
    for kind in report.kinds:
        why = f": {kind.reason}" if kind.reason else ""
        print(f"{kind.kind} ({kind.based}-based): {kind.verdict}{why}")
        if kind.verdict != battery.NOT_PROBED:
            for probed in kind.probes:
                if probed.result == battery.ABSENT:
                    print(f"  without {probed.name}: {probed.reason}")


def _row(name: str, cells: list[str]) -> str:
    return f"{name:24}{''.join(f' {cell:9}' for cell in cells)}".rstrip()


def _has_replicas_elsewhere() -> bool:
    """By policy and state, as far as these can be read: not everybody may."""
    policy, _ = read(paths().policy)
    if any(is_remote(link.target) for link in policy.links):
        return True
    with contextlib.suppress(BlktrackError, OSError):
        known = store()
        return any(is_remote(link.target) for one in known.ids() for link in known.links(one))
    return False
