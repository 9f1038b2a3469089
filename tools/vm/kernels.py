"""Which kernels: a row here is all that a new one needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tools.vm.packages import FetchError, Suite, cached, run, unpack

# The name of a kernel, and the release of Debian whose linux-image-amd64 it is: the generic kernel,
# as the one for clouds has no 9p. The newest is whatever sid has on the day it is fetched.
SUITES = {"6.1": "bookworm", "6.12": "trixie", "newest": "sid"}

# The one that the short selection of `make test` boots: the oldest is the one with most traps.
BRIEF = "6.12"

_META = "linux-image-amd64"
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
    def image(self) -> Path:
        """From sid's 7.x on it is among the modules."""
        old = self.root / "boot" / f"vmlinuz-{self.version}"
        return old if old.exists() else self.modules / "vmlinuz"

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
    if not found.image.exists():
        raise FetchError(f"{_META} of {suite} has no vmlinuz")
    run("depmod", "-b", root, found.version)


def parts(source: Suite) -> list[str]:
    """The packages that hold files of the kernel which the meta package stands for."""
    wanted, found = [_META], list[str]()
    while wanted:
        for name in source.depends(wanted.pop()):
            if name.startswith(_PARTS) and name not in found:
                found.append(name)
                wanted.append(name)
    return found
