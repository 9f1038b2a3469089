"""Where an instance keeps its things: the places of the design, or all of them below one folder."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest

from blktrack.config import BPFFS, Paths


def paths_for(root: str | None, monkeypatch: pytest.MonkeyPatch) -> Paths:
    if root is None:
        monkeypatch.delenv("BLKTRACK_ROOT", raising=False)
    else:
        monkeypatch.setenv("BLKTRACK_ROOT", root)
    return Paths.from_environment()


@pytest.mark.parametrize("root", [None, ""])
def test_system_wide(root: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = paths_for(root, monkeypatch)
    assert [str(path) for path in astuple(paths)] == [
        "/sys/fs/bpf/blktrack",
        "/run/blktrack",
        "/var/lib/blktrack",
        "/etc/blktrack/blktrack.toml",
    ]


def test_below_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = paths_for(str(tmp_path), monkeypatch)
    assert paths.run == tmp_path / "run/blktrack"
    assert paths.lib == tmp_path / "var/lib/blktrack"
    assert paths.policy == tmp_path / "etc/blktrack/blktrack.toml"
    # Pins can only be in bpffs: their folder is told apart by its name.
    assert paths.pins.parent == BPFFS
    assert paths.pins.name.startswith("blktrack-")
    assert not list(tmp_path.iterdir())  # asking makes nothing


def test_roots_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (paths_for(str(tmp_path / name), monkeypatch) for name in ("here", "there"))
    assert not set(astuple(here)) & set(astuple(there))


def test_one_root_by_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path or a symbolic link leads to the same pins: the instance is the folder."""
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to("root")
    expected = paths_for(str(tmp_path / "root"), monkeypatch)
    monkeypatch.chdir(tmp_path)
    for spelling in ("root", "./root/", "link", f"{tmp_path}/link/../root"):
        assert paths_for(spelling, monkeypatch) == expected
