"""Tests below guest/ run inside virtual machines, once on each kernel, and report as all others.

They are collected here and there alike. Here, instead of running one, its reports are awaited from
the machine that runs it; there each report is written to the share as it is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blockdev import told
from tests.conftest import NEEDS
from tests.vm import relay
from tests.vm.machines import BRIEF, INSIDE, KERNELS
from tests.vm.matrix import CELL
from tests.vm.runs import Runs

GUEST = Path(__file__).parent / "guest"
NEEDED = ("root", "qemu-system-x86_64", "depmod")  # of this host
CI = bool(os.environ.get("CI"))
RUNS = pytest.StashKey[Runs]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" not in metafunc.fixturenames:
        return
    # Of the session, so that pytest has the tests of one kernel follow each other.
    metafunc.parametrize("kernel", KERNELS, indirect=True, scope="session")


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of a kernel, of tools.vm.kernels.SUITES: a test with it is done on each."""
    return str(request.param)


def pytest_itemcollected(item: pytest.Item) -> None:
    if name := kernel_of(item):
        item.add_marker("vm")
        if name != BRIEF or not item.get_closest_marker("brief"):
            item.add_marker("matrix")
    if is_guests(item):
        # A machine has a limit of its own; the turn that it waits for has none.
        item.add_marker(pytest.mark.timeout(0))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that have machines of their own come first: those of the guests' run beside them."""
    if not any(kernel_of(item) for item in items if not is_guests(item)):
        return
    places = [place for place, item in enumerate(items) if GUEST.parent in item.path.parents]
    ordered = sorted((items[place] for place in places), key=is_guests)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if INSIDE or session.config.option.collectonly or NEEDS.missing(NEEDED):
        return
    if any(map(is_guests, session.items)):  # from the beginning: all other tests run beside them
        runs(session)


def kernel_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("kernel", "")) if callspec else ""


def is_guests(item: pytest.Item) -> bool:
    return not INSIDE and GUEST in item.path.parents


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if not is_guests(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def reports(item: pytest.Item) -> Iterator[pytest.TestReport]:
    if reason := NEEDS.missing(NEEDED):
        yield own_report(item, reason, skip=not CI)
        return
    outcome = runs(item.session).outcome(item)
    for data in outcome.reports:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        if report.failed:
            report.sections.append(("the machine", outcome.machine()))
        yield report
    if outcome.error:
        yield own_report(item, outcome.error, skip=outcome.run.absent and not CI)


def runs(session: pytest.Session) -> Runs:
    if RUNS not in session.stash:
        items = [item for item in session.items if is_guests(item)]
        session.stash[RUNS] = Runs(items, beside=len(items) < len(session.items))
    return session.stash[RUNS]


def own_report(item: pytest.Item, reason: str, *, skip: bool = False) -> pytest.TestReport:
    """That of a test which did not come to its end, or did not begin."""

    def end() -> None:
        if skip:
            pytest.skip(reason)
        pytest.fail(reason, pytrace=False)

    call = pytest.CallInfo.from_call(end, when="call")
    report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What a test measured is said in the end, but for the cells of the matrix: it has a table."""
    found = dict(report.user_properties) if report.when == "call" else {}
    if "measured" in found and CELL not in found and not INSIDE:
        told(f"{report.nodeid.rpartition('::')[2]}: {found['measured']}")


def pytest_configure(config: pytest.Config) -> None:
    if INSIDE:
        config.pluginmanager.register(relay.Relay(config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RUNS in session.stash:
        session.stash[RUNS].close()
