"""The text format of Prometheus, version 0.0.4."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    name: str
    kind: str  # gauge, counter
    help: str


class Exposition:
    """Samples of the metrics of a catalogue; a second one of the same labels replaces the first.

    prefix -- of all names outside.
    """

    def __init__(self, catalogue: Iterable[Metric], prefix: str) -> None:
        self._metrics = {metric.name: metric for metric in catalogue}
        self._samples: dict[str, dict[str, float]] = {name: {} for name in self._metrics}
        self._prefix = prefix

    def add(self, name: str, value: float | None, labels: Labels) -> None:
        """None: it is not known, and left out."""
        if value is not None:
            self._samples[name][_labels(labels)] = value

    def add_state(self, name: str, states: Iterable[str], state: str, labels: Labels) -> None:
        """One sample for each of the states, 1 for the one that holds and 0 for the others."""
        for each in states:
            self.add(name, each == state, {**labels, "state": each})

    @property
    def text(self) -> bytes:
        lines = []
        for short, samples in self._samples.items():
            if samples:
                metric, name = self._metrics[short], self._prefix + short
                lines.append(f"# HELP {name} {_escaped(metric.help)}")
                lines.append(f"# TYPE {name} {metric.kind}")
                lines += [f"{name}{labels} {_number(value)}" for labels, value in samples.items()]
        return "".join(f"{line}\n" for line in lines).encode()


def _labels(labels: Labels) -> str:
    """Without those that are empty, which is the same to Prometheus."""
    told = ",".join(f'{key}="{_quoted(value)}"' for key, value in labels.items() if value)
    return f"{{{told}}}" if told else ""


def _quoted(text: str) -> str:
    # A path may hold any bytes; the format is UTF-8.
    valid = text.encode(errors="backslashreplace").decode()
    return _escaped(valid).replace('"', '\\"')


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if isinstance(value, int):  # whole: no digit of a counter is lost
        return str(int(value))
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
