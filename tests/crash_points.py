"""The names of crash points (blktrack/crash.py), read from the sources: no list can miss one."""

from __future__ import annotations

import ast
from pathlib import Path


def crash_points(folder: Path) -> tuple[str, ...]:
    """Those of all modules in a folder and below it, as often as they are there."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "crash.point":
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}: {ast.unparse(node)}"
                found.append(str(name.value))
    assert found, f"no crash points in {folder}"
    return tuple(found)
