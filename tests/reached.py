"""Watches which messages of the product a test run reaches, and says which it did not.

Imported before anything of blktrack: see tests/recorder. BLKTRACK_REACHED=DIR keeps the record.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.message_sites import PACKAGE, Site, error_classes, module_name, sites_of
from tests.recorder import sitecustomize
from tests.recorder.sitecustomize import MARKS, MODULES, ROOM, VARIABLE

GUEST = "BLKTRACK_GUEST"  # set in a virtual machine: the name of its kernel
LAST = "test_every_message_is_reached"


def _begin() -> Path:
    """The folder of the record: of the session around this one, if it is within one."""
    if given := os.environ.get(VARIABLE):
        folder = Path(given)
    else:
        folder = Path(tempfile.mkdtemp(prefix="blktrack-reached-"))
        atexit.register(_remove, folder, os.getpid())
    if not (folder / MARKS).exists():
        _prepare(folder)
    if GUEST in os.environ:  # an emulated processor is too slow for a recorder
        return folder
    os.environ[VARIABLE] = str(folder)
    above = os.environ.get("PYTHONPATH")
    if sitecustomize.HERE not in (above or "").split(os.pathsep):
        words = [sitecustomize.HERE, *([above] if above else [])]
        os.environ["PYTHONPATH"] = os.pathsep.join(words)
    sitecustomize.install(str(folder))
    return folder


def _remove(folder: Path, pid: int) -> None:
    """Not where a child of this process ends."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: Path) -> None:
    names = [".".join(word for word in (PACKAGE.name, name) if word) for name in PATHS]
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)  # some tests are another user
    (folder / MODULES).write_text("\n".join(names), encoding="utf-8")
    (folder / MARKS).write_bytes(bytes(ROOM * len(names)))
    (folder / MARKS).chmod(0o666)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDER = _begin()


def never_reached(folder: Path = FOLDER) -> list[Site]:
    """Of all places, those that no process has come to."""
    errors, marks = error_classes(), (folder / MARKS).read_bytes()
    missed = []
    for start, path in zip(range(0, len(marks), ROOM), PATHS.values(), strict=True):
        sites = sites_of(path, errors)
        assert len(sites) <= ROOM
        missed += [site for site, mark in zip(sites, marks[start:], strict=False) if not mark]
    return missed


class Whole:
    """Whether this run is the whole default set, and what of it was skipped."""

    def __init__(self) -> None:
        self.why_not = "it has not begun"
        self.skipped: list[str] = []

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        items.sort(key=lambda item: item.name == LAST)
        self.why_not = ""
        if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
            self.why_not = "only some files of the tests run"

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        marks = ("soak", "matrix")
        if any(not any(map(item.get_closest_marker, marks)) for item in items):
            self.why_not = "some tests were deselected"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)


WHOLE = Whole()
