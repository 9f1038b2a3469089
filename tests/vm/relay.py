"""Brings reports out of a machine: one line of JSON each, in the share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.vm.initramfs import SHARE

REPORTS = "reports"
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
