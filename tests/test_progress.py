"""What is told of a sync that is under way."""

from __future__ import annotations

import sys

import pytest

from blktrack.cli import progress
from blktrack.cli.progress import Watcher
from blktrack.units import MIB


def test_rounds_beyond_the_first_do_not_run_past_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER", 0.0)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    with Watcher(quiet=False) as watcher:
        watcher.phase("incremental", 4 * MIB)
        watcher.done(MIB)
        watcher.done(6 * MIB)
    first, second = capsys.readouterr().err.splitlines()
    assert "1 MiB of 4 MiB" in first
    assert "6 MiB of 6 MiB" in second
    assert "-" not in second, "a time to go is not negative"


def test_without_a_total_and_without_rich_there_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SHOW_AFTER", 0.0)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)
    with Watcher(quiet=False) as watcher:
        watcher.phase("recv", 0)
        watcher.done(MIB)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recv: 1 MiB, ") and "to go" not in line
