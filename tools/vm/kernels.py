"""Which kernels: a row here is all that a new one needs."""

from __future__ import annotations

import lzma
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import zstandard

from tools.vm.packages import FetchError, Suite, cached, run, unpack

# The name of a kernel, and the release of Debian whose linux-image-amd64 it is: the generic kernel,
# as the one for clouds has no 9p. The newest is whatever sid has on the day it is fetched.
SUITES = {"6.1": "bookworm", "6.12": "trixie", "newest": "sid"}

# The one that the short selection of `make test` boots: the oldest is the one with most traps.
BRIEF = "6.12"

_META = "linux-image-amd64"
_SIGNED = b"~Module signature appended~\n"
# From sid's 7.x on a kernel is split: linux-image-N needs linux-binary-N and linux-modules-N.
_PARTS = ("linux-image-", "linux-binary-", "linux-modules-")


@dataclass(frozen=True)
class Kernel:
    name: str
    root: Path  # a tree with /boot and /lib/modules

    @property
    def version(self) -> str:
        """As uname -r says it."""
        (modules,) = (self.root / "usr/lib/modules").iterdir()
        return modules.name

    @property
    def packed(self) -> Path:
        """From sid's 7.x on it is among the modules."""
        old = self.root / "boot" / f"vmlinuz-{self.version}"
        return old if old.exists() else self.modules / "vmlinuz"

    @property
    def image(self) -> Path:
        """Unpacked: an emulated processor takes seconds for that."""
        return self.root / "vmlinux"

    @property
    def modules(self) -> Path:
        return self.root / "usr/lib/modules" / self.version


def kernel(name: str) -> Kernel:
    """One of SUITES, fetched where the cache has it not. FetchError."""
    with cached(f"kernel-{name}", lambda root: _fetch(SUITES[name], root)) as folder:
        return Kernel(name, folder)


def _fetch(suite: str, root: Path) -> None:
    scratch = root.with_name(f"{root.name}.apt")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        source = Suite(suite, scratch)
        for archive in source.download(parts(source)):
            unpack(archive, root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if len(list((root / "usr/lib/modules").iterdir())) != 1:
        raise FetchError(f"{_META} of {suite} is no kernel with modules any more")
    found = Kernel(suite, root)
    if not found.packed.exists():
        raise FetchError(f"{_META} of {suite} has no vmlinuz")
    found.image.write_bytes(unpacked(found.packed.read_bytes()))
    for path in list(found.modules.rglob("*.ko*")):
        name = path if path.suffix == ".ko" else path.with_suffix("")
        data = unsigned(_inflated(path))
        path.unlink()
        name.write_bytes(data)
    run("depmod", "-b", root, found.version)


def _inflated(path: Path) -> bytes:
    """A module, as a kernel takes it: an emulated processor takes a second for a large one."""
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".zst":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def unsigned(module: bytes) -> bytes:
    """Without its signature, which is a fifth of the boot of 6.1 on an emulated processor.

    Linux's include/linux/module_signature.h: the last field of twelve bytes before the mark is how
    long the signature before them is. The kernel loads what has none, and says that it is tainted.
    """
    if not module.endswith(_SIGNED):
        return module
    end = len(module) - len(_SIGNED)
    (length,) = struct.unpack(">I", module[end - 4 : end])
    return module[: end - 12 - length]


def unpacked(image: bytes) -> bytes:
    """The ELF image in a bzImage: Linux's Documentation/arch/x86/boot.rst, payload_offset.

    qemu starts it at its PVH entry (CONFIG_PVH, which Debian's kernels have).
    """
    start, length = struct.unpack_from("<II", image, 0x248)
    start += (image[0x1F1] + 1) * 512  # setup_sects, and the boot sector
    packed = image[start : start + length]
    if packed.startswith(b"\xfd7zXZ"):
        # Its size stands behind it.
        return lzma.LZMADecompressor().decompress(packed)
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


def parts(source: Suite) -> list[str]:
    """The packages that hold files of the kernel which the meta package stands for."""
    wanted, found = [_META], list[str]()
    while wanted:
        for name in source.depends(wanted.pop()):
            if name.startswith(_PARTS) and name not in found:
                found.append(name)
                wanted.append(name)
    return found
