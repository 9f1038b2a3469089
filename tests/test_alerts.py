"""The alert rules and the dashboard in docs/: read by Prometheus, and about figures that there are.

A rule that asks for a figure by a wrong name would never fire, and nobody would notice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blktrack.metrics.names import CATALOGUE, PREFIX
from blktrack.units import MIB
from tests.blockdev import TOP, Lab, write_direct
from tests.test_metrics import promtool, samples, write_policy

RULES, TESTS, DASHBOARD = (
    TOP / "docs" / name for name in ("alerts.yml", "alerts_test.yml", "grafana-dashboard.json")
)
NAMES = {PREFIX + metric.name: metric for metric in CATALOGUE}
# There only while the kernel counts what programs cost: test_metrics.py sees them.
AT_TIMES = {
    *("program_runs_total", "program_run_seconds_total", "device_write_cost_seconds"),
    *("link_held_bytes", "link_last_failure_timestamp_seconds"),
}


def expressions(value: Any) -> Iterator[str]:
    """Of a dashboard, those of all its panels and variables."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "definition"):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def named(text: str) -> set[str]:
    return set(re.findall(r"\bblktrack_\w+", text))


@pytest.mark.needs("promtool")
def test_prometheus_reads_the_rules() -> None:
    promtool("check", "rules", RULES)
    promtool("test", "rules", TESTS)


def test_every_rule_is_tested_and_tells_what_to_do() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert len(alerts) > 10
    fired = re.findall(r"alertname: (\w+)\n +exp_alerts", TESTS.read_text())
    quiet = re.findall(r"\{eval_time: \w+, alertname: (\w+)\}", TESTS.read_text())
    assert set(fired) == set(quiet) == set(alerts)
    assert RULES.read_text().count("description:") == len(alerts)


def test_rules_and_dashboard_ask_for_figures_that_there_are() -> None:
    used = named("".join(re.findall(r"expr:(.*?)\n +(?:for|labels):", RULES.read_text(), re.S)))
    assert len(used) > 10
    assert used - set(NAMES) == set()
    board = json.loads(DASHBOARD.read_text())
    shown = named("\n".join(expressions(board)))
    assert shown - set(NAMES) == set()
    assert len(shown) > 20
    # A counter is shown as what it grew by.
    for expression in expressions(board):
        for name in named(expression):
            if name in NAMES and NAMES[name].kind == "counter":
                assert re.search(rf"(rate|increase)\({name}", expression), expression


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads(DASHBOARD.read_text())
    variables = {each["name"] for each in board["templating"]["list"]}
    assert {"datasource", "instance", "device"} <= variables
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"], panel["title"]
    places = [panel["gridPos"] for panel in panels]
    for number, one in enumerate(places):
        assert one["x"] + one["w"] <= 24
        for other in places[number + 1 :]:
            apart = [
                a[at] + a[size] <= b[at]
                for a, b in ((one, other), (other, one))
                for at, size in (("x", "w"), ("y", "h"))
            ]
            assert any(apart), (one, other)
    for expression in expressions(board):
        for used in re.findall(r"\$(\w+)", expression):
            assert used in variables | {"__rate_interval"}, expression


@pytest.mark.needs("promtool")
def test_prometheus_reads_the_dashboard(tmp_path: Path) -> None:
    """Its expressions, as rules with the variables filled in."""
    board = json.loads(DASHBOARD.read_text())
    found = [text for text in expressions(board["panels"]) if text]
    filled = [
        re.sub(r"\$(instance|device)", ".*", text).replace("$__rate_interval", "5m")
        for text in found
    ]
    rules = [{"record": f"r{number}", "expr": text} for number, text in enumerate(filled)]
    file = tmp_path / "rules.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", file)


@pytest.mark.needs("root", "loop", "bpf")
def test_every_figure_of_the_catalogue_comes(shared: Lab) -> None:
    device, replica = shared.loop(MIB), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    shared.untrack(device)
    shared.track(device)
    write_direct(device, 0, b"x" * 4096)
    shared.sync(device, replica)
    write_policy(
        shared,
        f'[device.a]\npath = "{device}"\n[device.a.replica.b]\ntarget = "{replica}"\nrpo = "1h"\n',
    )
    found = samples(shared.blktrack("metrics").out)
    assert {metric.name for metric in CATALOGUE} - set(found) <= AT_TIMES
