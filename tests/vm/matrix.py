"""The table of kernels and device stacks, from what the reports of the machines say."""

from __future__ import annotations

import re

import pytest

from tests.vm.machines import KERNELS

CELL = "matrix"  # the property of a test that passed: "tracked", or "refused"
_TEST = re.compile(r"test_stacks\.py::test_stack\[([^-\]]+)-(.+)\]$")


class Matrix:
    def __init__(self) -> None:
        self._cells: dict[str, dict[str, str]] = {}

    def record(self, report: pytest.TestReport) -> None:
        """A failure of any part of a test is one; what passed says of itself how."""
        if not (found := _TEST.search(report.nodeid)):
            return
        kernel, stack = found.groups()
        row = self._cells.setdefault(stack, {})
        if report.outcome != "passed":
            row[kernel] = report.outcome
        elif report.when == "call":
            row.setdefault(kernel, str(dict(report.user_properties).get(CELL, report.outcome)))

    def lines(self) -> list[str]:
        """As Markdown, for docs/support-matrix.md. "" where a test was not run."""
        if not self._cells:
            return []
        head = ["stack", *KERNELS]
        rows = [[stack, *(row.get(k, "") for k in KERNELS)] for stack, row in self._cells.items()]
        return [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
