"""`doctor` names what is missing, with its remedy. Each lack is made real, in a mount namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blktrack.bpf import layout
from blktrack.config import Paths
from blktrack.doctor import examine

BLKTRACK = f"{sys.executable} -m blktrack"


def doctor(
    root: Path, before: str = "", prefix: str = "", command: str = "doctor --json"
) -> tuple[int, str, str]:
    """Run it in a mount namespace of its own, after `before`, under `prefix`."""
    script = f"set -e; {before or 'true'}; {prefix} {BLKTRACK} {command}"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        capture_output=True,
        text=True,
        env={"BLKTRACK_ROOT": str(root), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def failed(out: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(out)["checks"] if not check["ok"]}


@pytest.mark.needs("root", "bpf")
def test_all_is_well_here(tmp_path: Path) -> None:
    code, out, err = doctor(tmp_path)
    assert (code, failed(out), err) == (0, {}, "")
    code, out, _ = doctor(tmp_path, command="doctor")
    assert code == 0
    assert "FAIL" not in out
    assert "programs" in out


@pytest.mark.needs("root", "bpf")
@pytest.mark.parametrize(
    ("before", "prefix", "name", "remedy"),
    [
        ("", "setpriv --reuid 65534 --clear-groups", "root", "sudo"),
        ("", "setarch --uname-2.6", "kernel", "5.14"),
        ("mount -t tmpfs none /sys/kernel/btf", "", "btf", "CONFIG_DEBUG_INFO_BTF"),
        ("umount -l /sys/fs/bpf", "", "bpffs", "mount -t bpf bpf /sys/fs/bpf"),
        (
            "mount -t tmpfs none /sys/kernel/security; "
            "echo 'none integrity [confidentiality]' > /sys/kernel/security/lockdown",
            "",
            "lockdown",
            "integrity",
        ),
        (
            'mount -t tmpfs none "$(/usr/bin/python3 -c '
            "'import bcc, os; print(os.path.dirname(bcc.__file__))'"
            ')"',
            "",
            "bcc",
            "apt-get install python3-bpfcc",
        ),
    ],
    ids=["root", "kernel", "btf", "bpffs", "lockdown", "bcc"],
)
def test_each_lack_is_named_with_its_remedy(
    tmp_path: Path, before: str, prefix: str, name: str, remedy: str
) -> None:
    code, out, err = doctor(tmp_path, before, prefix)
    assert code == 1, err
    assert remedy in failed(out)[name]["remedy"]
    assert "Traceback" not in err


@pytest.mark.needs("root", "bpf", "loop")
def test_track_mounts_bpffs_by_itself(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    before = f"umount -l /sys/fs/bpf; disk=$(losetup --find --show {image})"
    script = (
        f"track $disk && {BLKTRACK} untrack $disk; code=$?; losetup -d $disk; "
        "mount | grep 'bpf on /sys/fs/bpf'; exit $code"
    )
    code, out, err = doctor(tmp_path / "root", before, command=script)
    assert code == 0, err
    assert "tracking" in out
    assert "bpf on /sys/fs/bpf" in out


@pytest.mark.needs("root", "bpf")
@pytest.mark.parametrize(
    ("preempts", "cast", "says"),
    [(False, 0, []), (True, 0, ["there are none"]), (True, 1, ["seen to begin by kprobes"])],
)
def test_probes_matter_where_programs_are_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preempts: bool, cast: int, says: list[str]
) -> None:
    monkeypatch.setattr(layout, "preemptible", lambda btf: preempts)
    monkeypatch.setattr(layout, "cast", lambda btf: cast)
    report = examine(Paths.below(tmp_path), programs=lambda: None)
    found = [check for check in report.checks if check.name == "kprobes"]
    assert [text in check.detail for check, text in zip(found, says, strict=True)] == [True] * len(
        says
    )
    assert all(check.ok for check in found), "tracking is sound all the same"
