from __future__ import annotations

import os

import pytest

from blktrack.units import MIB, SECTOR
from tests.blockdev import Lab, run
from tests.vm.compiled import compile_once
from tests.vm.machines import DELIBERATE, INSIDE
from tests.vm.matrix import Matrix

collect_ignore = [] if DELIBERATE in os.environ else ["test_deliberate.py"]
_MATRIX = Matrix()
if INSIDE:
    compile_once()


@pytest.fixture(scope="session")
def mapper(attached: Lab) -> None:
    """A device of device-mapper stays tracked: to verify the programs takes an emulator long."""
    run("modprobe", "-a", "dm-mod", "dm-delay")
    size = MIB // SECTOR
    run("dmsetup", "create", "kept", "--table", f"0 {size} linear {attached.loop(MIB)} 0")
    attached.stack.callback(run, "dmsetup", "remove", "--retry", "kept")
    attached.track("/dev/mapper/kept")


@pytest.fixture(autouse=True)
def on_each_kernel(kernel: str) -> None:
    """Every test here has the parameter `kernel`, whether it asks for its name or not."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _MATRIX.record(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not INSIDE and (lines := _MATRIX.lines()):
        terminalreporter.section("device stacks")
        terminalreporter.write_line("\n".join(lines))
