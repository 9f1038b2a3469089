"""The table of `make vmtest` says what was seen, and nothing of what was not run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vm.matrix import CELL, Matrix

_FILE = "tests/vm/guest/test_stacks.py"


def report(test: str, when: Any, outcome: Any, said: str = "") -> pytest.TestReport:
    properties: list[tuple[str, object]] = [(CELL, said)] if said else []
    place = (_FILE, 1, test)
    return pytest.TestReport(
        f"{_FILE}::{test}", place, {}, outcome, None, when, user_properties=properties
    )


def test_table_of_what_was_run() -> None:
    matrix = Matrix()
    assert matrix.lines() == []
    for name, said in (("loop", "tracked"), ("zram", "refused")):
        matrix.record(report(f"test_stack[6.1-{name}]", "setup", "passed"))
        matrix.record(report(f"test_stack[6.1-{name}]", "call", "passed", said))
    matrix.record(report("test_stack[newest-loop]", "call", "passed", "tracked"))
    matrix.record(report("test_stack[newest-loop]", "teardown", "failed"))
    matrix.record(report("test_other[6.1-md-raid1]", "call", "passed"))
    assert matrix.lines() == [
        "| stack | 6.1 | 6.12 | newest |",
        "| --- | --- | --- | --- |",
        "| loop | tracked |  | failed |",
        "| zram | refused |  |  |",
    ]
