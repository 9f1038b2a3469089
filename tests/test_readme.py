"""The pages are followed word for word: their commands are run, and print what the pages say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from blktrack.units import MIB
from tests.blockdev import TOP, Lab, run, wait_until
from tests.console import Command, Result, Section, differences, sections
from tests.console import run as type_in
from tests.needs import TOOL_PATH

RECOVERY = TOP / "docs/recovery.md"
# xor ax,ax; mov ds,ax; mov dx,0x3f8; mov si,0x7c1d; next: lodsb; test al,al; jz off; out dx,al;
# jmp next; off: mov dx,0x604; mov ax,0x2000; out dx,ax (ACPI: off); cli; hlt
BOOT_CODE = bytes.fromhex("31c08ed8baf803be1d7cac84c07403eeebf8ba0406b80020effaf4ebfd")
BOOT_LINE = b"booted from the replica\r\n\0"


def environment(**names: str) -> dict[str, str]:
    env = {**os.environ, "PATH": f"{TOP / '.venv/bin'}:{TOOL_PATH}", "LC_ALL": "C.UTF-8"}
    return {**env, **names}


def named(commands: list[Command], names: Mapping[str, str]) -> list[Command]:
    """The reader is asked to put names of devices in: `# DISK=/dev/sdX`."""
    found = []
    for command in commands:
        name, is_set, _ = command.text.partition("=")
        if command.shown and is_set and name in names:
            command = replace(command, text=f"{name}={names[name]}")
        found.append(command)
    return found


def detach_files(folder: Path) -> None:
    """Detach what the reader attached and the page, cut short by a failure, did not detach."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        # Found by inode: the name that the kernel tells belongs to mounts that are gone by now.
        for device in run("losetup", "--noheadings", "--output=NAME", "-j", file).split():
            run("losetup", "--detach", device)
            wait_until(lambda file=file: not run("losetup", "-j", file), f"the end of {device}")  # type: ignore[misc]


# What the page takes for granted: a source with files on it, mounted, and its replica.
PREPARED = """
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 $DISK
dd if=boot.bin of=$DISK conv=notrunc,fsync status=none
mount $DISK /srv
echo 'order 4710' >/srv/orders.csv
head -c 8M /dev/urandom >/srv/photos.tar
sync -f /srv
blktrack track $DISK --quiet
blktrack sync $DISK $REPLICA --quiet
"""


def prepared(names: Mapping[str, str]) -> list[Command]:
    lines = [line for line in PREPARED.splitlines() if line]
    return [Command(f"{name}={value}", 0, shown=False) for name, value in names.items()] + [
        Command(line, 0, shown=False) for line in lines
    ]


def recovery_sections() -> list[ParameterSet]:
    _, *found = sections(RECOVERY.read_text(encoding="utf-8"))
    return [
        pytest.param(section, id=section.title, marks=pytest.mark.needs(*needed(section)))
        for section in found
        if section.commands
    ]


def needed(section: Section) -> set[str]:
    return {"qemu-system-x86_64"} & {command.text.split()[0] for command in section.commands}


@pytest.mark.needs("root", "loop", "bpf", "ext4")
@pytest.mark.parametrize("section", recovery_sections())
def test_recovery_as_the_page_says(shared: Lab, section: Section) -> None:
    disk, new_disk = shared.loop(64 * MIB), shared.loop(64 * MIB)
    boot = (BOOT_CODE + BOOT_LINE).ljust(510, b"\0") + b"\x55\xaa"
    (shared.folder / "boot.bin").write_bytes(boot)
    replica = str(shared.folder / "data.img")
    names = {"DISK": disk, "REPLICA": replica, "NEWDISK": new_disk}
    shared.stack.callback(detach_files, shared.folder)
    results = type_in(
        prepared(names) + named(section.commands, names),
        folder=shared.folder,
        env=environment(),
        told_as={disk: "/dev/vg0/data", new_disk: "/dev/sdX", str(shared.folder): "/backup"},
    )
    assert not "\n\n".join(differences(results))


def results_of(*said: str, code: int = 0) -> list[Result]:
    page = "\n".join(["## one", "```console", "# blktrack sync", *said, "```"])
    return [
        Result(command, 1 if command.text == "blktrack sync" and code else 0, ("3 KiB shipped",))
        for section in sections(page)
        for command in section.commands
    ]


def test_a_page_that_says_something_else_is_noticed() -> None:
    assert not list(differences(results_of("17.5 MiB shipped")))
    for said in ([], ["3 KiB sent"], ["3 KiB shipped", "more"], ["3 things shipped"]):
        assert list(differences(results_of(*said))), said
    assert list(differences(results_of("3 KiB shipped", code=1)))
