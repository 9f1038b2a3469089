from __future__ import annotations

import os

import pytest

from tests.vm.compiled import compile_once
from tests.vm.machines import DELIBERATE, INSIDE
from tests.vm.matrix import Matrix

collect_ignore = [] if DELIBERATE in os.environ else ["test_deliberate.py"]
_MATRIX = Matrix()
if INSIDE:
    compile_once()


@pytest.fixture(autouse=True)
def on_each_kernel(kernel: str) -> None:
    """Every test here has the parameter `kernel`, whether it asks for its name or not."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _MATRIX.record(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not INSIDE and (lines := _MATRIX.lines()):
        terminalreporter.section("device stacks")
        terminalreporter.write_line("\n".join(lines))
