"""Runs what is chosen of guest/: a machine for each kernel and row of MACHINES, three at a time.

While tests drive machines of their own, these count as one of the three. A machine that is done is
removed with its disks, unless a test failed in it: then its folder stays below `failed` in the
cache, until the next one of its name fails.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import conftest
from tests.blockdev import told
from tests.reached import GUEST
from tests.vm import relay
from tests.vm.machines import DELIBERATE, MACHINES
from tests.vm.relay import Report
from tools.vm import kernels, packages
from tools.vm.machine import Machine, MachineError
from tools.vm.packages import FetchError

# One more than two processors: a machine waits for its disks and its timers at times.
AT_ONCE = int(os.environ.get("BLKTRACK_VM_JOBS") or min(3, (os.cpu_count() or 1) + 1))
PASSED = ("CI", DELIBERATE)  # to the tests inside
_NICE = 10
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Outcome:
    reports: list[Report]  # setup, call and teardown, as far as the test came
    error: str  # why there are no more, "" for a test that came to its end
    run: Run

    def machine(self) -> str:
        """What to see of the machine when a test failed."""
        return self.run.tail()


class Run:
    """The tests of one machine."""

    def __init__(self, kernel: str, row: str, tests: Sequence[str]) -> None:
        self.name = f"{kernel}-{row}"
        self._kernel = kernel
        self._layout = MACHINES[row]
        self._tests = tests
        self._folder = packages.cache() / "running" / f"{self.name}-{os.getpid()}-{next(_NUMBERS)}"
        self._machine: Machine | None = None
        self._stopped = threading.Event()
        self._error = ""
        self.absent = False  # the kernel could not be fetched

    def work(self) -> None:
        """In a thread of the pool: from the fetching of the kernel to the end of the machine."""
        begin = time.monotonic()
        try:
            kernel = kernels.kernel(self._kernel)
            layer = packages.guest_layer()
            self._folder.mkdir(parents=True)
            disks = [spec.make(self._folder) for spec in self._layout.disks]
            machine = self._machine = Machine(
                kernel,
                layer,
                self._folder,
                disks,
                memory=self._layout.memory,
                arguments=self._layout.arguments,
            )
            if self._stopped.is_set():
                return
            start = time.monotonic()
            machine.start(self._script(), self._environment())
            if self._stopped.is_set():  # before there was what `stop` kills
                return
            machine.until("ready", self._layout.limit)
            ready = time.monotonic()
            machine.wait(self._layout.limit)
            told(
                f"{self.name}, Linux {kernel.version}: {len(self._tests)} tests, boot "
                f"{ready - start:.1f} s, all {time.monotonic() - begin:.0f} s"
            )
        except FetchError as error:
            self._error, self.absent = str(error), True
        except MachineError as error:
            self._error = str(error)
        finally:
            if self._machine:
                self._machine.kill()

    def _script(self) -> str:
        (self._folder / "share").mkdir()
        (self._folder / "share" / "tests").write_text("\n".join(self._tests), encoding="utf-8")
        # What is chosen was chosen outside, by node id.
        words = [sys.executable, "-B", "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"]
        words += ["-p", "no:hypothesispytest"]
        return " ".join([*words, "-v", "--strict-markers", "@/vm/tests"])

    def _environment(self) -> dict[str, str]:
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        return {**passed, GUEST: self._kernel, "BLKTRACK_SEED": str(conftest.SEED)}

    def reports(self, test: str) -> list[Report]:
        return [data for data in self._all() if data["nodeid"] == test]

    def _all(self) -> list[Report]:
        return list(relay.read(self._folder / "share"))

    def reason(self) -> str:
        if self.absent:
            return f"no machine {self.name}: {self._error}"
        if self._error:
            return f"The test did not come to its end in the machine {self.name}: {self._error}"
        return f"The pytest of the machine {self.name} said nothing of the test.\n{self.tail()}"

    def tail(self) -> str:
        return self._machine.tail() if self._machine else ""

    def stop(self) -> None:
        self._stopped.set()
        if self._machine:
            self._machine.kill()

    def through(self) -> bool:
        """Whether each of its tests has ended: then the machine is about to."""
        ended = {data["nodeid"] for data in self._all() if data["when"] == "teardown"}
        return ended.issuperset(self._tests)

    def leave(self) -> None:
        """Remove the folder of the machine, or keep it for who wants to know what failed."""
        failed = self._error or any(data["outcome"] == "failed" for data in self._all())
        if failed and self._folder.exists():
            kept = packages.cache() / "failed" / self.name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            self._folder.rename(kept)
            told(f"{self.name} failed: its folder is {kept}")
        shutil.rmtree(self._folder, ignore_errors=True)


def clear() -> None:
    """Remove the folders of runs that were killed."""
    for folder in (packages.cache() / "running").glob("*-*-*-*"):
        if not Path("/proc", folder.name.split("-")[-2]).exists():
            shutil.rmtree(folder, ignore_errors=True)


class Runs:
    def __init__(self, items: Sequence[pytest.Item], *, beside: bool) -> None:
        """All are queued. beside -- until the first outcome is asked for, others have machines."""
        clear()
        groups = defaultdict[tuple[str, str], list[str]](list)
        for item in items:
            groups[key_of(item)].append(item.nodeid)
        # What a thread starts is as nice: tests with machines of their own, which come one after
        # another and are most of the time, have a processor to themselves.
        self._pool = ThreadPoolExecutor(
            AT_ONCE, thread_name_prefix="vm", initializer=os.nice, initargs=(_NICE,)
        )
        self._alone = threading.Event()
        if beside:
            self._pool.submit(self._alone.wait)
        # Those that take long first, so that all end at about the same time.
        keys = sorted(groups, key=lambda key: MACHINES[key[1]].limit, reverse=True)
        self._runs = {key: Run(*key, groups[key]) for key in keys}
        self._ends: dict[tuple[str, str], Future[None]] = {
            key: self._pool.submit(run.work) for key, run in self._runs.items()
        }

    def outcome(self, item: pytest.Item) -> Outcome:
        """Wait until the test is through, or its machine."""
        self._alone.set()
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
                end.result(timeout=0.2)

    def close(self) -> None:
        for end in self._ends.values():
            end.cancel()
        self._alone.set()
        for key, end in self._ends.items():
            if not end.done() and not self._runs[key].through():
                self._runs[key].stop()
        self._pool.shutdown()
        for run in self._runs.values():
            run.leave()


def key_of(item: pytest.Item) -> tuple[str, str]:
    assert isinstance(item, pytest.Function)
    mark = item.get_closest_marker("machine")
    return str(item.callspec.params["kernel"]), mark.args[0] if mark else "plain"
