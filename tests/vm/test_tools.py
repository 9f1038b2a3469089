"""What boots the machines, as far as no machine is needed to see it."""

from __future__ import annotations

import lzma
import random
import re
import shlex
import struct
import sys
import threading
from pathlib import Path

import pytest
import zstandard

from tests.blockdev import TOP, run
from tools.vm import packages
from tools.vm.disk import Disk
from tools.vm.initramfs import Archive
from tools.vm.kernels import unpacked, unsigned
from tools.vm.packages import FetchError, cached

SECTORS = 27  # of setup code, between the boot sector and the kernel


@pytest.mark.parametrize("pack", [lzma.compress, zstandard.compress], ids=["xz", "zstd"])
def test_kernel_is_unpacked(pack: object, seed: int) -> None:
    """As a bzImage has it: 6.1 is packed by xz, later ones by zstd."""
    assert callable(pack)
    kernel = b"\x7fELF" + random.Random(seed).randbytes(1 << 16)
    packed = pack(kernel)
    image = bytearray((1 + SECTORS) * 512 + 100)
    image[0x1F1] = SECTORS
    struct.pack_into("<II", image, 0x248, 100, len(packed) + 4)
    size = struct.pack("<I", len(kernel))  # behind what is packed
    assert unpacked(bytes(image) + packed + size + b"other") == kernel


def test_a_module_without_its_signature(seed: int) -> None:
    """As scripts/sign-file.c of Linux appends it."""
    module = b"\x7fELF" + random.Random(seed).randbytes(1 << 12)
    signature = random.Random(seed + 1).randbytes(681)
    about = struct.pack(">8xI", len(signature))
    assert unsigned(module + signature + about + b"~Module signature appended~\n") == module
    assert unsigned(module) == module


def test_archive_is_as_the_kernel_reads_it() -> None:
    """Linux's Documentation/driver-api/early-userspace/buffer-format.rst."""
    archive = Archive()
    files = {
        "bin": (b"", 0o040755),
        "bin/busybox": (b"#!", 0o100755),
        "hidden": (b"abcde", 0o100644),
    }
    for name, (data, mode) in files.items():
        archive.add(name, data, mode)
    assert read(archive.finish()) == files


def read(made: bytes) -> dict[str, tuple[bytes, int]]:
    found: dict[str, tuple[bytes, int]] = {}
    at = 0
    while True:
        assert made[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = [int(made[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = made[at + 110 : at + 109 + length].decode()
        start = (at + 110 + length + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = made[start : start + size], mode
        at = (start + size + 3) // 4 * 4


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLKTRACK_VM_CACHE", str(tmp_path / "cache"))
    return packages.cache()


def test_what_is_cached_is_made_once(folder: Path) -> None:
    made: list[Path] = []

    def make(new: Path) -> None:
        made.append(new)
        (new / "file").write_text("whole")

    def use() -> None:
        with cached("thing", make) as made_once:
            assert (made_once / "file").read_text() == "whole"

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_what_was_not_finished_is_made_anew(folder: Path) -> None:
    def fail(new: Path) -> None:
        (new / "half").touch()
        raise FetchError("the mirror is away")

    with pytest.raises(FetchError, match="the mirror is away"), cached("thing", fail):
        pass
    assert not (folder / "thing").exists()
    with cached("thing", lambda new: (new / "file").touch()) as whole:
        assert [path.name for path in whole.iterdir()] == ["file"]


def test_tool_that_fails_is_quoted() -> None:
    with pytest.raises(FetchError, match=r"^sh -c echo no >&2; exit 3 failed: no$"):
        packages.run("sh", "-c", "echo no >&2; exit 3")
    with pytest.raises(FetchError, match=r"no-such-tool is not installed: run tools/setup\.sh dev"):
        packages.run("no-such-tool")


def test_the_commands_of_the_manual_choose_tests() -> None:
    """Those of docs/vmtest.md that name some."""
    manual = (TOP / "docs/vmtest.md").read_text(encoding="utf-8")
    chosen = re.findall(r"""make vmtest ARGS="(-k .*?)\"""", manual)
    assert chosen
    for words in chosen:
        asked = ["-m", "vm", "--co", *shlex.split(words)]
        run(sys.executable, "-m", "pytest", *asked, TOP / "tests/vm")


def test_disk_of_no_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kind of disk: floppy"):
        Disk("a", tmp_path / "a.img", "floppy").words(0)
