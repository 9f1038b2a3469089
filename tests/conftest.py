"""A test says what it needs of the machine, and a random one how to repeat it."""

from __future__ import annotations

import os
import random

import pytest

from tests import reached  # before anything that imports blktrack
from tests.compiled import compile_once
from tests.needs import PROBES, Needs

pytest.register_assert_rewrite("tests.blockdev")
pytest_plugins = ["tests.fixtures", "tests.loopdev", "tests.bench", "tests.netlab", "tests.farside"]

if reached.GUEST not in os.environ:  # an emulated processor takes ten seconds to import it
    from hypothesis import settings

    # A shared machine may stall any single example; the time limit of a test is pytest-timeout's.
    settings.register_profile("blktrack", deadline=None, print_blob=True)
    settings.load_profile("blktrack")
    compile_once()

NEEDS = Needs()
SEED = int(os.environ.get("BLKTRACK_SEED") or random.SystemRandom().randrange(2**32))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(reached.WHOLE)
    for name in PROBES:
        config.addinivalue_line("markers", f"{name}: the test needs {name}; see tests/needs.py")


def pytest_report_header() -> str:
    return f"seed: BLKTRACK_SEED={SEED}"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Make needs("bpf") and the mark `bpf` the same, so that -m "not bpf" selects."""
    for name in needs_of(item):
        if name in PROBES:
            item.add_marker(name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose need is missing; in CI fail it. Runs before the test's fixtures."""
    try:
        reason = NEEDS.missing(needs_of(item))
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
    if reason and os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason)


def needs_of(item: pytest.Item) -> list[str]:
    marked = [name for name in PROBES if item.get_closest_marker(name)]
    return [str(name) for mark in item.iter_markers("needs") for name in mark.args] + marked


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of all random choices of this run; a failed test shows how to set it again."""
    request.node.add_report_section("call", "seed", f"BLKTRACK_SEED={SEED}")
    return SEED
