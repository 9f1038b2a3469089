"""One run of tests that are awaited: in a machine, or in a process of their own on this host.

A run has a folder, below `running` in the cache: `share/reports` is what it tells, test by test. It
goes with the run, unless a test failed in it: then it stays below `failed` in the cache, until the
next one of its name fails.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from tests import conftest
from tests.blockdev import told
from tests.reached import GUEST
from tests.vm import relay
from tests.vm.machines import ALONE, DELIBERATE, Layout
from tests.vm.relay import Report
from tools.vm import kernels, packages
from tools.vm.machine import Machine, MachineError
from tools.vm.packages import FetchError

PASSED = ("CI", DELIBERATE)  # to the tests inside
_PYTEST = [sys.executable, "-B", "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"]
_NUMBERS = itertools.count()
_LINES = 60  # of what a process said


class Run(ABC):
    """Tests that are run elsewhere, one after another."""

    def __init__(self, name: str, tests: Sequence[str]) -> None:
        self.name = name
        self._tests = tests
        self._folder = packages.cache() / "running" / f"{name}-{os.getpid()}-{next(_NUMBERS)}"
        self._share = self._folder / "share"
        self._stopped = threading.Event()
        self._error = ""
        self.absent = False  # the kernel could not be fetched

    @abstractmethod
    def work(self) -> None:
        """In a thread of the pool, from the beginning to the end."""

    @abstractmethod
    def tail(self) -> str:
        """What to see of it when a test failed."""

    def stop(self) -> None:
        self._stopped.set()

    def reports(self, test: str) -> list[Report]:
        return [data for data in self._all() if data["nodeid"] == test]

    def _all(self) -> list[Report]:
        return list(relay.read(self._share))

    def reason(self) -> str:
        """Why there are no more reports of a test than there are."""
        if self.absent:
            return f"no machine {self.name}: {self._error}"
        if self._error:
            return f"The test did not come to its end in the machine {self.name}: {self._error}"
        return f"The pytest of {self.name} said nothing of the test.\n{self.tail()}"

    def through(self) -> bool:
        """Whether each of its tests has ended: then the run is about to."""
        ended = {data["nodeid"] for data in self._all() if data["when"] == "teardown"}
        return ended.issuperset(self._tests)

    def leave(self) -> None:
        """Remove the folder, or keep it for who wants to know what failed."""
        failed = self._error or any(data["outcome"] == "failed" for data in self._all())
        if failed and self._folder.exists():
            kept = packages.cache() / "failed" / self.name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            self._folder.rename(kept)
            told(f"{self.name} failed: its folder is {kept}")
        shutil.rmtree(self._folder, ignore_errors=True)


class InMachine(Run):
    """All tests of guest/ of one kernel and row of MACHINES."""

    def __init__(self, kernel: str, row: str, layout: Layout, tests: Sequence[str]) -> None:
        super().__init__(f"{kernel}-{row}", tests)
        self._kernel, self._layout = kernel, layout
        self._machine: Machine | None = None

    def work(self) -> None:
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
        self._share.mkdir()
        (self._share / "tests").write_text("\n".join(self._tests), encoding="utf-8")
        # What is chosen was chosen outside, by node id.
        words = [*_PYTEST, "-p", "no:hypothesispytest", "-v", "--strict-markers", "@/vm/tests"]
        return " ".join(words)

    def _environment(self) -> dict[str, str]:
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        return {**passed, GUEST: self._kernel, "BLKTRACK_SEED": str(conftest.SEED)}

    def tail(self) -> str:
        return self._machine.tail() if self._machine else ""

    def stop(self) -> None:
        super().stop()
        if self._machine:
            self._machine.kill()


class InProcess(Run):
    """A test of the host that drives machines of its own."""

    def __init__(self, kernel: str, test: str) -> None:
        name = test.rpartition("/")[2].translate(str.maketrans("[]:", "   "))
        super().__init__(f"{kernel}-{'_'.join(name.split())}", [test])
        self._process: subprocess.Popen[bytes] | None = None

    def work(self) -> None:
        self._share.mkdir(parents=True)
        environment = {ALONE: str(self._share), "BLKTRACK_SEED": str(conftest.SEED)}
        with (self._folder / "output").open("wb") as output:
            # It ends, and takes its machines with it, if this thread does.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "INT", "--", *_PYTEST, "-v", *self._tests],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=packages.TOP,
                env={**os.environ, **environment},
                process_group=0,
            )
        if self._stopped.is_set():  # before there was what `stop` ends
            self._process.send_signal(signal.SIGINT)
        self._process.wait()
        for line in relay.said(self._share):
            told(line)

    def tail(self) -> str:
        said = self._folder / "output"
        text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
        return "\n".join(text.splitlines()[-_LINES:])

    def stop(self) -> None:
        super().stop()
        if self._process:
            self._process.send_signal(signal.SIGINT)


def clear() -> None:
    """Remove the folders of runs that were killed."""
    for folder in (packages.cache() / "running").glob("*-*-*-*"):
        if not Path("/proc", folder.name.split("-")[-2]).exists():
            shutil.rmtree(folder, ignore_errors=True)
