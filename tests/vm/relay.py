"""Brings reports out of a run: one line of JSON each, in its share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blockdev import TOLD
from tools.vm.initramfs import SHARE

REPORTS, SAID = "reports", "told"
Report = dict[str, Any]


class Relay:
    """Inside: a plugin that writes each report as soon as it is made."""

    def __init__(self, config: pytest.Config, share: Path = Path(SHARE)) -> None:
        self._config = config
        self._share = share

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with (self._share / REPORTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(data, default=str) + "\n")

    def pytest_sessionfinish(self) -> None:
        (self._share / SAID).write_text("\n".join(TOLD), encoding="utf-8")


def said(share: Path) -> list[str]:
    """Outside: what a run that has ended had measured."""
    path = share / SAID
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def read(share: Path) -> Iterator[Report]:
    """Outside: those that are there by now."""
    try:
        text = (share / REPORTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            data = json.loads(line)
            if isinstance(data["longrepr"], list):  # where a test was skipped, and why
                data["longrepr"] = tuple(data["longrepr"])
            yield data
