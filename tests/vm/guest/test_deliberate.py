"""What tests can come to, for test_harness.py to see how it is reported: collected for it alone."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_passes() -> None:
    assert Path("/vm/run").exists()


def test_fails() -> None:
    print("said before the failure")
    assert [1, 2] == [1, 3]


def test_skips() -> None:
    pytest.skip("as was to be seen")


def test_panics() -> None:
    Path("/proc/sysrq-trigger").write_text("c", encoding="ascii")


def test_comes_too_late() -> None:
    pass
