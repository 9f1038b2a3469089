"""A missing need skips on a laptop and fails in CI; nothing else may happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.needs import Needs

OUTER = {"CI", "PYTEST_ADDOPTS", "BLKTRACK_SEED"}
ROOT = Path(__file__).resolve().parent.parent


def run_pytest(tmp_path: Path, body: str, *args: str, **env: str) -> tuple[int, str]:
    """Run the tests in `body` under this repository's conftest.py, as another session."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n", encoding="utf-8")
    (tmp_path / "test_body.py").write_text(
        f"import pytest\nfrom tests.conftest import NEEDS\n{body}", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", *args, str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in OUTER} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


UNMET = """
NEEDS._reasons["fio"] = "it is at the menders"
@pytest.mark.needs("fio")
def test_it():
    pass
"""


def test_missing_need_skips(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, UNMET)
    assert code == 0
    assert "1 skipped" in out
    assert "needs fio: it is at the menders" in out


def test_missing_need_fails_in_ci(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, UNMET, CI="true")
    assert code == 1
    assert "needs fio: it is at the menders" in out
    assert "skipped" not in out


def test_need_is_a_mark(tmp_path: Path) -> None:
    _, out = run_pytest(tmp_path, UNMET, "-m", "not fio")
    assert "1 deselected" in out


def test_unknown_need_fails(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, UNMET.replace('needs("fio")', 'needs("foi")'))
    assert code == 1
    assert "unknown need: foi" in out


def test_failure_shows_its_seed(tmp_path: Path) -> None:
    body = "def test_it(seed):\n    assert seed != 7\n"
    code, out = run_pytest(tmp_path, body, BLKTRACK_SEED="7")
    assert code == 1
    assert "Captured seed call" in out
    assert out.count("BLKTRACK_SEED=7") == 2  # in the header and with the failure


def test_every_reason_is_named_and_each_probe_asked_once() -> None:
    asked = []

    def absent() -> str:
        asked.append("absent")
        return "not here"

    table = Needs({"a": absent, "b": lambda: "", "c": lambda: "broken"})
    assert table.missing(["a", "b", "c", "a"]) == "needs a: not here; needs c: broken"
    assert table.missing(["a"]) == "needs a: not here"
    assert table.missing(["b"]) == ""
    assert asked == ["absent"]


def test_probes_answer_on_this_machine() -> None:
    for name, probe in needs.PROBES.items():
        assert isinstance(probe(), str), name


def test_tool_that_is_not_there() -> None:
    assert needs.tool("no-such-tool") == "no no-such-tool in PATH"


def test_without_root_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert needs.root() == needs.bpf() == needs.zram() == "not root"
