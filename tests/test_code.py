"""The code keeps its own rules: style, format, types, and which module may import which.

Modules live on floors and import only from lower ones, so that every part can be understood, tested
and replaced without what is above it. A package is a room: its modules may import each other on one
floor. So may those of floor 0, the words that everything else is written in.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "blktrack"

# A package named here gives its floor to every module in it that has no row of its own.
FLOORS = {
    "": 0,  # blktrack/__init__.py: the version
    "units": 0,
    "errors": 0,
    "extent": 0,
    "point": 0,
    "observer": 0,
    "crash": 0,
    "bitmap": 1,
    "linux": 1,
    "sysfs": 1,
    "durable": 1,
    "config": 1,
    "report": 1,
    "rates": 1,
    "bpf": 2,
    "bitfile": 2,
    "device": 2,
    "fingerprint": 2,
    "mapper": 2,
    "state": 2,
    "uevents": 2,
    "use": 2,
    "systemd": 2,
    "ship": 2,
    "ship.copy": 3,
    "ship.worker": 3,
    "ship.apply": 3,
    "ship.replica": 3,
    "ship.receive": 4,
    "ship.tell": 4,
    "ship.room": 3,
    "ship.remote": 3,
    "ship.keeper": 4,
    "tracker": 3,
    "tracker.service": 5,
    "tracker.status": 4,
    "tracker.live_link": 4,
    "tracker.live": 4,
    "history": 3,
    "doctor": 3,
    "quiesce": 3,
    "probe": 4,
    "capture": 4,
    "options": 4,
    "policy": 5,
    "round": 5,
    "replication": 6,
    "sync": 7,
    "send": 7,
    "verify": 8,
    "fleet": 8,
    "metrics": 8,
    "told": 3,
    "tui": 8,
    "schedule": 3,
    "cli": 9,
    "__main__": 10,  # python -m blktrack: calls cli
}

# Who alone may import what from outside: the rooms that may, by the module that they import.
RESERVED = {
    "bcc": {"bpf"},
    "rich": {"cli", "tui"},
    "rich.live": {"tui"},
    "rich.progress": {"cli"},
}

# What a room may not import although its floor would allow it. The far side runs only `ship`.
FORBIDDEN = {"ship": {"tracker", "bpf"}}


def module_name(path: Path) -> str:
    """The name of a module below blktrack: "ship.copy", "ship" for its __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def row_of(module: str) -> str | None:
    """The row of FLOORS that says the floor of `module`, None where there is none."""
    rows = [row for row in FLOORS if row == module or (row and module.startswith(f"{row}."))]
    return max(rows, key=len, default=None)


def floor_of(module: str) -> int:
    row = row_of(module)
    if row is None:
        raise LookupError(f"blktrack.{module} has no floor in FLOORS")
    return FLOORS[row]


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Every absolute dotted name that `source` imports, wherever it does, with what it takes of it.

    `from blktrack.ship import copy` gives blktrack.ship.copy: which of them are modules the caller
    knows.
    """
    here = ["blktrack", *module.split(".")] if module else ["blktrack"]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                above = here[: len(here) - level + is_package] if level else []
                prefix = ".".join([*above, *([base] if base else [])])
                yield from (f"{prefix}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def target_of(name: str, modules: set[str]) -> str | None:
    """The module of blktrack that the imported `name` leads to; None for one from outside."""
    if name.partition(".")[0] != "blktrack":
        return None
    target = name.partition(".")[2]
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target


def violations(
    source: str, module: str, modules: set[str], *, is_package: bool = False
) -> Iterator[str]:
    """What `source`, as the text of `module`, imports against the rules: one sentence each."""
    room, floor = room_of(module), floor_of(module)
    for name in imports_of(source, module, is_package=is_package):
        target = target_of(name, modules)
        if target is None:
            for reserved, rooms in RESERVED.items():
                if f"{name}.".startswith(f"{reserved}.") and room not in rooms:
                    yield f"blktrack.{module} imports {name}, reserved for {sorted(rooms)}"
            continue
        may_meet = room_of(target) == room or floor == 0
        if floor_of(target) >= floor + may_meet:
            yield (
                f"blktrack.{module} (floor {floor}) imports blktrack.{target}"
                f" (floor {floor_of(target)})"
            )
        if room_of(target) in FORBIDDEN.get(room, ()):
            yield f"blktrack.{module} imports blktrack.{target}, forbidden for {room}"


def test_every_module_has_a_floor() -> None:
    assert [module for module in MODULES if row_of(module) is None] == []


def test_every_floor_row_has_a_module() -> None:
    assert set(FLOORS) - {row_of(module) for module in MODULES} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if row_of(name) is not None])
def test_imports_keep_to_the_floors(module: str) -> None:
    path = MODULES[module]
    found = violations(
        path.read_text(encoding="utf-8"),
        module,
        set(MODULES),
        is_package=path.name == "__init__.py",
    )
    assert list(found) == []


SYNTHETIC = {"", "errors", "units", "tracker", "sync", "bpf", "bpf.kernel", "bpf.btf"} | {
    "ship",
    "ship.copy",
    "ship.endpoint",
    "ship.replica",
    "cli",
    "cli.top",
}


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("tracker", "from blktrack import sync", True),
        ("tracker", "from blktrack.sync import run", True),
        ("tracker", "import blktrack.sync as s", True),
        ("tracker", "from . import sync", True),
        ("tracker", "from .sync import run", True),
        ("tracker", "def f():\n    import blktrack.sync", True),
        ("tracker", "import importlib\nimportlib.import_module('blktrack.sync')", True),
        ("tracker", "from blktrack.ship.copy import copy", True),
        ("tracker", "from blktrack.ship import copy", True),
        ("tracker", "from blktrack.bpf import kernel", False),
        ("tracker", "from blktrack import __version__, units", False),
        ("tracker", "import bcc", True),
        ("units", "from blktrack.errors import UsageError", False),
        ("units", "from blktrack import bpf", True),
        ("bpf.kernel", "from bcc import BPF", False),
        ("bpf.kernel", "from . import btf\nfrom .btf import load", False),
        ("bpf.kernel", "from blktrack.ship import replica", True),
        ("ship.copy", "from .endpoint import open_end", False),
        ("ship.copy", "from blktrack.ship.replica import Replica", False),
        ("ship.endpoint", "from blktrack.ship.copy import copy", True),
        ("ship.copy", "from blktrack.bpf import kernel", True),
        ("ship.copy", "from blktrack import tracker", True),
        ("ship.copy", "import rich", True),
        ("cli.top", "from rich.progress import Progress\nfrom rich.table import Table", False),
        ("cli.top", "from rich.live import Live", True),
        ("cli.top", "from rich import live", True),
        ("cli.top", "import richer, bccx", False),
    ],
)
def test_walker_catches(module: str, source: str, broken: bool) -> None:
    assert bool(list(violations(source, module, SYNTHETIC))) == broken


def test_relative_import_in_a_package() -> None:
    assert list(imports_of("from .copy import a", "ship", is_package=True)) == [
        "blktrack.ship.copy.a"
    ]
    assert list(imports_of("from ..units import a", "ship.copy")) == ["blktrack.units.a"]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=["style", "format", "types"],
)
def test_tool_finds_nothing(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
