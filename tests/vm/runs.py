"""Awaited tests, as many runs at a time as there are processors: of guest/ a machine for each
kernel and row of MACHINES, and a process for each test of the host that drives its own machines.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.vm.machines import MACHINES
from tests.vm.relay import Report
from tests.vm.run import InMachine, InProcess, Run, clear

# An emulated processor keeps a real one busy. A third machine on two of them only takes caches from
# the others: of the same tests, two at once took 47 s a machine, three at once 58 s.
AT_ONCE = int(os.environ.get("BLKTRACK_VM_JOBS") or min(3, os.cpu_count() or 1))
_NICE = 10  # machines give way to what else this host does
_GUEST = "tests/vm/guest/"


@dataclass(frozen=True)
class Outcome:
    reports: list[Report]  # setup, call and teardown, as far as the test came
    error: str  # why there are no more, "" for a test that came to its end
    run: Run


class Runs:
    def __init__(self, items: Sequence[pytest.Item]) -> None:
        """All are queued."""
        clear()
        groups = defaultdict[tuple[str, str], list[pytest.Item]](list)
        for item in items:
            groups[key_of(item)].append(item)
        # Those that take long first, so that all end at about the same time.
        keys = sorted(groups, key=lambda key: limit_of(key, groups[key][0]), reverse=True)
        self._runs = {key: made(key, groups[key]) for key in keys}
        # What a thread starts is as nice as it is.
        self._pool = ThreadPoolExecutor(
            AT_ONCE, thread_name_prefix="vm", initializer=os.nice, initargs=(_NICE,)
        )
        self._ends: dict[tuple[str, str], Future[None]] = {
            key: self._pool.submit(run.work) for key, run in self._runs.items()
        }

    def outcome(self, item: pytest.Item) -> Outcome:
        """Wait until the test is through, or its run."""
        run, end = self._runs[key_of(item)], self._ends[key_of(item)]
        while True:
            ended = end.done()
            reports = run.reports(item.nodeid)
            if any(data["when"] == "teardown" for data in reports):
                return Outcome(reports, "", run)
            if ended:
                end.result()
                return Outcome(reports, run.reason(), run)
            with contextlib.suppress(TimeoutError):
                end.result(timeout=1.0)

    def close(self) -> None:
        for end in self._ends.values():
            end.cancel()
        for key, end in self._ends.items():
            if not end.done() and not self._runs[key].through():
                self._runs[key].stop()
        self._pool.shutdown()
        for run in self._runs.values():
            run.leave()


def key_of(item: pytest.Item) -> tuple[str, str]:
    """Kernel and machine; a test of the host is by itself."""
    assert isinstance(item, pytest.Function)
    kernel = str(item.callspec.params["kernel"])
    if not item.nodeid.startswith(_GUEST):
        return kernel, item.nodeid
    mark = item.get_closest_marker("machine")
    return kernel, mark.args[0] if mark else "plain"


def limit_of(key: tuple[str, str], item: pytest.Item) -> float:
    """Seconds that a run may take."""
    if key[1] in MACHINES:
        return MACHINES[key[1]].limit
    return max((float(mark.args[0]) for mark in item.iter_markers("timeout")), default=0.0)


def made(key: tuple[str, str], items: Sequence[pytest.Item]) -> Run:
    kernel, where = key
    tests = [item.nodeid for item in items]
    if where in MACHINES:
        return InMachine(kernel, where, MACHINES[where], tests)
    return InProcess(kernel, where)
