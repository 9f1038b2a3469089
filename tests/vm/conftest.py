"""Tests of kernels run elsewhere, once on each kernel, and report as all others do.

Those below guest/ run inside virtual machines; others, which drive machines, in processes of their
own, so that several are under way. They are collected here and there alike. Here, instead of
running one, its reports are awaited; there each report is written to a share as it is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blockdev import told
from tests.conftest import NEEDS
from tests.vm import relay
from tests.vm.machines import ALONE, BRIEF, INSIDE, KERNELS
from tests.vm.matrix import CELL
from tests.vm.runs import Runs

NEEDED = ("root", "qemu-system-x86_64", "depmod")  # of this host
CI = bool(os.environ.get("CI"))
HERE = Path(__file__).parent
AWAITS = not INSIDE and ALONE not in os.environ  # this is the session that others report to
RUNS = pytest.StashKey[Runs]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" not in metafunc.fixturenames:
        return
    names = [BRIEF] if metafunc.definition.get_closest_marker("one_kernel") else KERNELS
    # Of the session, so that pytest has the tests of one kernel follow each other.
    metafunc.parametrize("kernel", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of a kernel, of tools.vm.kernels.SUITES: a test with it is done on each."""
    return str(request.param)


def pytest_itemcollected(item: pytest.Item) -> None:
    if name := kernel_of(item):
        item.add_marker("vm")
        if name != BRIEF or not item.get_closest_marker("brief"):
            item.add_marker("matrix")
    if is_awaited(item):
        # A run has a limit of its own; the turn that it waits for has none.
        item.add_marker(pytest.mark.timeout(0))


def kernel_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("kernel", "")) if callspec else ""


def is_awaited(item: pytest.Item) -> bool:
    """One that is run elsewhere, on a kernel: in a machine, or with machines of its own."""
    return AWAITS and bool(kernel_of(item))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of those here, tests that are not awaited come first: they can be done meanwhile."""

    def turn(item: pytest.Item) -> int:
        return 0 if not item.get_closest_marker("vm") else 2 if is_awaited(item) else 1

    here = [item for item in items if HERE in item.path.parents]
    ordered = iter(sorted(here, key=turn))
    items[:] = [next(ordered) if HERE in item.path.parents else item for item in items]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not is_awaited(item):
        # Not beside others: some change what a thread of this process would read.
        if AWAITS and item.get_closest_marker("vm") and not NEEDS.missing(NEEDED):
            runs(item.session)
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # A test that ran here before this one left up what this one has in common with it: the next
    # may not. What pytest does at the end of a test; it has no public name for that.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def reports(item: pytest.Item) -> Iterator[pytest.TestReport]:
    if reason := NEEDS.missing(NEEDED):
        yield own_report(item, reason, skip=not CI)
        return
    outcome = runs(item.session).outcome(item)
    for data in outcome.reports:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        if report.failed:
            report.sections.append((f"of {outcome.run.name}", outcome.run.tail()))
        yield report
    if outcome.error:
        yield own_report(item, outcome.error, skip=outcome.run.absent and not CI)


def runs(session: pytest.Session) -> Runs:
    if RUNS not in session.stash:
        session.stash[RUNS] = Runs([item for item in session.items if is_awaited(item)])
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
    if "measured" in found and CELL not in found and AWAITS:
        told(f"{report.nodeid.rpartition('::')[2]}: {found['measured']}")


def pytest_configure(config: pytest.Config) -> None:
    if INSIDE:
        config.pluginmanager.register(relay.Relay(config))
    elif share := os.environ.get(ALONE):
        config.pluginmanager.register(relay.Relay(config, Path(share)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RUNS in session.stash:
        session.stash[RUNS].close()
