"""Fixtures of block devices, and what a run does at its beginning and end."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from blktrack.units import MIB
from tests.blockdev import TOLD, Lab, lab_in_memory, written_by_page
from tests.needs import zram

KINDS = ("loop-512", "loop-4096", "partition-512", "partition-4096", "zram")
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.needs(*{k} & {"zram"})) for k in KINDS]
)


def pytest_configure() -> None:
    """A run that is told to end takes its devices with it.

    What a shell has started with & or nohup ignores signals, and so would all that tests start.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TOLD:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(TOLD))


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Needs root. An instance of its own, whose programs have yet to be made."""
    with lab_in_memory(monkeypatch.setenv) as made:
        yield made


@pytest.fixture(scope="session")
def attached() -> Iterator[Lab]:
    """An instance with a device of each kind tracked, so that its programs stay in the kernel."""
    with pytest.MonkeyPatch.context() as patch, lab_in_memory(patch.setenv) as made:
        made.track(made.loop(MIB))
        if not zram():
            disk = made.zram(MIB)
            if not written_by_page():  # or it is refused
                made.track(disk)
        yield made


@pytest.fixture
def shared(attached: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A lab of the instance of the session: compiling and verifying the programs takes seconds."""
    monkeypatch.setenv("BLKTRACK_ROOT", str(attached.folder / "root"))
    with attached.fresh() as made:
        yield made
