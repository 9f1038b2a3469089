"""The service unit, as systemd itself reads it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from blktrack import systemd
from blktrack.units import MIB
from tests.blockdev import TOP, Lab, run

pytestmark = pytest.mark.needs("root", "loop", "bpf", "systemd")


def analyzed(folder: Path, *units: Path) -> str:
    """What `systemd-analyze verify` has to say at its most talkative; it must have no complaint."""
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"}
    command = ["systemd-analyze", "verify", *(str(unit) for unit in units)]
    quiet = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    loud = {**environment, "SYSTEMD_LOG_LEVEL": "debug"}
    return subprocess.run(command, capture_output=True, text=True, env=loud, check=True).stdout


def dependencies(dump: str, unit: str, kind: str) -> set[str]:
    """Units that `unit` is ordered against or pulls in, from such a dump."""
    _, _, text = dump.partition(f"-> Unit {unit}:\n")
    own = text.partition("-> Unit ")[0]
    lines = [line.strip() for line in own.splitlines()]
    return {line.split()[1] for line in lines if line.startswith(f"{kind}: ")}


def test_the_unit_is_ordered_against_the_mounts_of_tracked_devices(lab: Lab) -> None:
    disk = lab.loop(64 * MIB)
    run("mkfs.ext4", "-q", "-F", disk)
    uuid = run("blkid", "-p", "-o", "value", "-s", "UUID", disk)
    link = Path("/dev/disk/by-uuid") / uuid
    if not link.is_symlink():  # where no udev runs
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(disk)
        lab.stack.callback(link.unlink)
    lab.track(disk)
    units = lab.name("units")
    assert lab.blktrack("service", "install", "--to", units).code == 0
    (units / "srv.mount").write_text(f"[Mount]\nWhat={link}\nWhere=/srv\n")
    dump = analyzed(units, units / systemd.UNIT, units / "srv.mount")
    by_uuid = run("systemd-escape", "--path", "--template=blockdev@.target", link)
    assert by_uuid in dependencies(dump, systemd.UNIT, "Before")
    assert by_uuid in dependencies(dump, systemd.UNIT, "Wants"), "or the order binds nobody"
    assert by_uuid in dependencies(dump, "srv.mount", "After")
    assert f"dev-{Path(disk).name}.device" in dependencies(dump, systemd.UNIT, "After")
    assert "shutdown.target" in dependencies(dump, systemd.UNIT, "Conflicts")


def test_the_commands_of_the_unit_are_ours(lab: Lab) -> None:
    text = lab.blktrack("service", "show").out
    commands = [line.partition("=")[2] for line in text.splitlines() if line.startswith("Exec")]
    assert [command.split()[1] for command in commands] == ["start", "stop"]
    for command in commands:
        assert run(command.split()[0], "--version").startswith("blktrack ")
    assert Path(commands[0].split()[0]).is_relative_to(TOP / ".venv")


def test_installing_and_removing(lab: Lab) -> None:
    units = lab.name("units")
    assert lab.blktrack("service", "install", "--to", units).code == 0
    assert {path.name for path in units.iterdir()} == {systemd.UNIT, f"{systemd.UNIT}.d"}
    assert lab.blktrack("service", "remove", "--to", units).code == 0
    assert not list(units.iterdir())
