"""What a schedule says once, and when it says it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from blktrack.config import Paths
from blktrack.told import Told, Trouble

FULL = Trouble(1, "/backup is full: 12 MiB short")


class Schedule:
    def __init__(self, root: Path, remind: float) -> None:
        self.paths, self.now, self.remind = Paths.below(root), 1000.0, remind

    def run(self, troubles: Mapping[str, Trouble], *looked: str) -> bool:
        """Whether a run that finds this tells of it."""
        told = Told(self.paths, self.remind, lambda: self.now)
        news = told.is_news(troubles)
        told.record(troubles, looked or ("a", "b"), told=news)
        return news


@pytest.fixture
def hourly(tmp_path: Path) -> Schedule:
    return Schedule(tmp_path, 3600)


def test_once_then_after_an_hour(hourly: Schedule) -> None:
    assert hourly.run({"a": FULL})
    hourly.now += 3599
    assert not hourly.run({"a": FULL})
    hourly.now += 1
    assert hourly.run({"a": FULL})
    assert not hourly.run({"a": FULL})


def test_without_a_time_each_time(tmp_path: Path) -> None:
    always = Schedule(tmp_path, 0)
    assert always.run({"a": FULL}) and always.run({"a": FULL})


def test_a_change_is_news_and_a_number_is_none(hourly: Schedule) -> None:
    assert hourly.run({"a": FULL})
    assert not hourly.run({"a": Trouble(1, "/backup is full: 13 MiB short")})
    assert hourly.run({"a": Trouble(4, FULL.words)})
    assert hourly.run({"a": Trouble(4, "no point")})
    assert hourly.run({"a": Trouble(4, "no point"), "b": FULL}), "b is new"
    assert not hourly.run({"a": Trouble(4, "no point")}), "that one is well is no mail"


def test_what_was_well_in_between_is_news(hourly: Schedule) -> None:
    assert hourly.run({"a": FULL})
    assert not hourly.run({})
    assert hourly.run({"a": FULL})


def test_what_is_not_looked_at_is_kept(hourly: Schedule) -> None:
    assert hourly.run({"a": FULL})
    assert not hourly.run({}, "b")
    assert not hourly.run({"a": FULL})


def test_what_is_busy_now_and_then_is_told_once(hourly: Schedule) -> None:
    busy = Trouble(6, "held by process 17")
    assert hourly.run({"a": busy})
    for _ in range(3):
        assert not hourly.run({})
        assert not hourly.run({"a": Trouble(6, "held by process 18")})
    assert hourly.run({"a": FULL})
    hourly.now += 3600
    assert not hourly.run({}) and hourly.run({"a": busy})


def test_a_clock_that_went_back_silences_nothing(hourly: Schedule) -> None:
    assert hourly.run({"a": FULL})
    hourly.now = 10.0
    assert hourly.run({"a": FULL})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2}', '{"format": 1, "told": {"a": 3}}', "\0"]
)
def test_a_damaged_file_is_told_over(hourly: Schedule, text: str) -> None:
    path = hourly.paths.lib / "told.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert hourly.run({"a": FULL})
    assert not hourly.run({"a": FULL}), "it was not written anew"


def test_what_cannot_be_kept_is_told_each_time(hourly: Schedule) -> None:
    hourly.paths.lib.parent.mkdir(parents=True)
    hourly.paths.lib.write_text("a file where a folder should be")
    assert hourly.run({"a": FULL}) and hourly.run({"a": FULL})
