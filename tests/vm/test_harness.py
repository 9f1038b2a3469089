"""Machines end in every way that they can, and what they are told and tell is not lost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.machines import BRIEF, DELIBERATE
from tools.vm import kernels, packages
from tools.vm.disk import Disk
from tools.vm.machine import Machine, MachineError

pytestmark = [
    pytest.mark.needs("root", "qemu-system-x86_64", "depmod"),
    pytest.mark.vm,
    pytest.mark.matrix,
]
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    disk = Disk("blk", tmp_path / "image", log=tmp_path / "log")
    disk.create(16 * MIB)
    with Machine(kernels.kernel(BRIEF), packages.guest_layer(), tmp_path, [disk]) as made:
        yield made


def alive(machine: Machine) -> bool:
    """Whether any process works for it."""
    words = str(machine.folder).encode()
    return any(words in cmdline(path) for path in Path("/proc").glob("[0-9]*/cmdline"))


def cmdline(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_exit_code_and_environment_come_through(machine: Machine) -> None:
    machine.start("echo $GREETING; uname -r; exit 7", {"GREETING": "it's me"})
    assert machine.wait(120) == 7
    said = (machine.share / "output").read_text(encoding="utf-8")
    assert said == f"it's me\n{machine.kernel.version}\n"
    assert not alive(machine)


def test_host_is_read_only(machine: Machine) -> None:
    with tempfile.NamedTemporaryFile("w+", dir=packages.cache()) as file:
        print("of the host", file=file, flush=True)
        name = file.name
        machine.start(f"cat {name}; echo changed >{name}; cat {name}; modprobe dm-thin-pool")
        assert machine.wait(120) == 0, machine.tail()
        said = (machine.share / "output").read_text(encoding="utf-8")
        assert said == "of the host\nchanged\n"
        assert Path(name).read_text(encoding="utf-8") == "of the host\n"


def test_what_was_written_outlives_a_power_cut(machine: Machine) -> None:
    write = "echo written | dd of=/dev/vda bs=512 conv=sync oflag=direct; touch /vm/done"
    machine.start(f"{write}; sleep 1000")
    machine.until("done", 120)
    machine.kill()
    assert not alive(machine)
    assert machine.disks[0].image.read_bytes().startswith(b"written\n")
    # dm-log-writes.c: the magic of the super block.
    log = machine.disks[0].log
    assert log is not None
    assert log.read_bytes()[:8] == (0x6A736677736872).to_bytes(8, "little")
    machine.start("head -c 8 /dev/vda >/vm/read")
    assert machine.wait(120) == 0
    assert (machine.share / "read").read_bytes() == b"written\n"


def test_panic_is_told_with_the_console(machine: Machine) -> None:
    machine.start("echo c >/proc/sysrq-trigger; sleep 1000")
    with pytest.raises(MachineError, match=r"died\.[^$]*sysrq triggered crash"):
        machine.wait(120)
    assert not alive(machine)


def test_time_limit_leaves_nothing(machine: Machine) -> None:
    machine.start("sleep 1000")
    machine.until("ready", 120)
    with pytest.raises(MachineError, match="was not done after 1 s"):
        machine.wait(1)
    assert not alive(machine)


def test_reports_are_those_of_the_guest() -> None:
    """Each outcome, and that of what a dead machine did not come to, in a pytest of its own."""
    words = ["-m", "vm", "-k", BRIEF, "-p", "no:cacheprovider", "-v"]
    file = "tests/vm/guest/test_deliberate.py"
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, file],
        capture_output=True,
        text=True,
        check=False,
        cwd=packages.TOP,
        env={**environment, DELIBERATE: "1"},
    )
    out = done.stdout
    assert done.returncode == 1, out
    for name, outcome in {
        "passes": "PASSED",
        "fails": "FAILED",
        "skips": "SKIPPED",
        "panics": "FAILED",
        "comes_too_late": "FAILED",
    }.items():
        assert f"test_{name}[{BRIEF}] {outcome}" in out
    assert "assert [1, 2] == [1, 3]" in out
    assert "said before the failure" in out
    assert "as was to be seen" in out
    assert out.count("did not come to its end in the machine") == 2
    assert "sysrq triggered crash" in out
