"""A figure of the benchmark: what was asked for, what was measured, and every run it comes from."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

Run = dict[str, Any]


@dataclass
class Figure:
    """One line of the table. `values` are what `measured` is the median of, one for each pair."""

    name: str
    what: str
    unit: str = "×"
    at_least: float | None = None  # neither: no target, for comparison
    at_most: float | None = None
    values: list[float] = field(default_factory=list)
    note: str = ""  # what exactly was measured, or why nothing was
    parts: dict[str, Any] = field(default_factory=dict)  # what else the runs tell
    runs: list[Run] = field(default_factory=list)

    @property
    def measured(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """None without a target or without a measurement."""
        value = self.measured
        if value is None or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.show(self.at_least)}"
        return f"≤ {self.show(self.at_most)}" if self.at_most is not None else ""

    def show(self, value: float) -> str:
        """Three digits and the unit."""
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        text = f"{value:.{digits}f}"
        return f"{text.rstrip('0').rstrip('.') if digits else text} {self.unit}"

    def as_json(self) -> dict[str, Any]:
        low, high = (min(self.values), max(self.values)) if self.values else (None, None)
        shown = {"measured": self.measured, "met": self.met, "min": low, "max": high}
        return {**shown, **asdict(self)}


def medians(runs: list[Run], *, digits: int = 3) -> dict[str, float]:
    """The median over the runs of every number in them, rounded."""
    names = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    return {
        name: round(statistics.median(run[name] for run in runs), digits)
        for name in names
        if all(name in run for run in runs)
    }
