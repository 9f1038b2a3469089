"""The pages are followed word for word: their commands are run, and print what the pages say."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from blktrack.bpf import kernel
from blktrack.config import Paths
from blktrack.units import MIB
from tests.blockdev import TOP, Lab, run, wait_until
from tests.console import Command, Result, Section, differences, same_everywhere, sections
from tests.console import run as type_in
from tests.needs import TOOL_PATH

README = TOP / "README.md"
MEASURED = TOP / "docs/measured.md"
PAGES = (
    "recovery.md",
    "consistency.md",
    "elsewhere.md",
    "scheduling.md",
)  # in docs/, all with one source
# xor ax,ax; mov ds,ax; mov dx,0x3f8; mov si,0x7c1d; next: lodsb; test al,al; jz off; out dx,al;
# jmp next; off: mov dx,0x604; mov ax,0x2000; out dx,ax (ACPI: off); cli; hlt
BOOT_CODE = bytes.fromhex("31c08ed8baf803be1d7cac84c07403eeebf8ba0406b80020effaf4ebfd")
BOOT_LINE = b"booted from the replica\r\n\0"


def environment(**names: str) -> dict[str, str]:
    # Not of the make that runs the tests: it would say which folders it enters, and pass on ARGS.
    outer = {
        name: value for name, value in os.environ.items() if "MAKE" not in name and name != "ARGS"
    }
    env = {**outer, "PATH": f"{TOP / '.venv/bin'}:{TOOL_PATH}", "LC_ALL": "C.UTF-8"}
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


def told_sections() -> list[ParameterSet]:
    found = []
    for page in PAGES:
        first, *others = sections((TOP / "docs" / page).read_text(encoding="utf-8"))
        for one in others:
            if one.commands:
                section = Section(one.title, first.commands + one.commands)
                marks = pytest.mark.needs(*needed(section))
                found.append(pytest.param(section, id=f"{page}: {one.title}", marks=marks))
    return found


def needed(section: Section) -> set[str]:
    return {"qemu-system-x86_64", "sqlite3"} & {
        command.text.split()[0] for command in section.commands
    }


@pytest.mark.needs("root", "loop", "bpf", "ext4")
@pytest.mark.parametrize("section", told_sections())
def test_as_the_page_says(shared: Lab, section: Section) -> None:
    disk, new_disk = shared.loop(64 * MIB), shared.loop(64 * MIB)
    boot = (BOOT_CODE + BOOT_LINE).ljust(510, b"\0") + b"\x55\xaa"
    (shared.folder / "boot.bin").write_bytes(boot)
    replica = str(shared.folder / "data.img")
    names = {"DISK": disk, "REPLICA": replica, "NEWDISK": new_disk}
    own = Paths.below(shared.folder / "own").pins  # of a page that takes a root of its own
    shared.stack.callback(kernel.remove, own)
    shared.stack.callback(detach_files, shared.folder)
    results = type_in(
        prepared(names) + named(section.commands, names),
        folder=shared.folder,
        env=environment(),
        told_as={
            disk: "/dev/vg0/data",
            new_disk: "/dev/sdX",
            Path(new_disk).name: "sdX",
            str(shared.folder): "/backup",
            f"on {os.uname().nodename} needs": "on host needs",
        },
    )
    assert not "\n\n".join(differences(results))


def working_tree(folder: Path) -> Path:
    """What a clone would have once all is committed."""
    listed = run("git", "-C", TOP, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (TOP / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, folder / name)
    return folder


def in_place_of_this(clone: Path) -> list[Command]:
    """Commands that put a clone in the place of this one, for the shell alone, with its .venv.

    It is where the paths in .venv lead to, so `make setup` finds that made and leaves it alone.
    /var/tmp is the shell's own as well.
    """
    venv, scratch = clone.with_name("venv"), clone.with_name("scratch")
    for folder in (clone / ".venv", venv, scratch):
        folder.mkdir()
    lines = [
        f"mount --bind {TOP}/.venv {venv}",
        f"mount --bind {clone} {TOP}",
        f"mount --bind {venv} {TOP}/.venv",
        f"mount --bind {scratch} /var/tmp",
        f"cd {TOP}",
    ]
    return [Command(line, 0, shown=False) for line in lines]


def readme_section(title: str) -> Section:
    (found,) = (
        section
        for section in sections(README.read_text(encoding="utf-8"))
        if section.title == title
    )
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[list[Command]]:
    """Commands to be typed first. What they leave, cut short by a failure, is taken away."""
    assert (TOP / ".venv/setup.stamp").exists(), "make setup has to come first"
    (tmp_path / "clone").mkdir()
    yield in_place_of_this(working_tree(tmp_path / "clone"))
    for left in (tmp_path / "scratch").iterdir():
        kernel.remove(Paths.below(Path("/var/tmp", left.name, "state")).pins)
    detach_files(tmp_path / "scratch")


@pytest.mark.needs("root", "loop", "bpf", "ext4")
def test_the_tour_of_the_readme(tmp_path: Path, clone: list[Command]) -> None:
    tour = readme_section("Five minutes").commands
    results = type_in(clone + tour, folder=tmp_path, env=environment())
    assert not "\n\n".join(differences(results))
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.timeout(900)
@pytest.mark.needs("root", "loop", "bpf", "ext4", "sqlite3")
def test_the_two_commands_of_the_readme(tmp_path: Path, clone: list[Command]) -> None:
    """`make test` would run this test again: told by its environment, it only collects."""
    two = readme_section("Two commands").commands
    assert [command.text for command in two] == ["make demo", "make test"]
    env = environment(PYTEST_ADDOPTS="--collect-only -q", COLUMNS="100")
    env.pop("BLKTRACK_ROOT", None)
    *_, demo, test = type_in(clone + two, folder=tmp_path, env=env, patience=800)
    assert (demo.code, test.code) == (0, 0), (demo.output, test.output)
    assert "tests/test_readme.py" in "\n".join(test.output)
    assert same_demo(demo.output) == same_demo(demo_of_the_page())


def demo_of_the_page() -> list[str]:
    _, _, rest = MEASURED.read_text(encoding="utf-8").partition("```text\n")
    return rest.partition("```")[0].splitlines()


def same_demo(lines: Iterable[str]) -> list[str]:
    """How consistent a point under load is depends on the load."""
    return [re.sub(r"\b(none|crash|filesystem)\b", "", same_everywhere(line)) for line in lines]


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
