"""Debian packages, downloaded and unpacked without being installed.

What is fetched is kept in the cache, each set in a folder of its own that appears in one rename
when it is complete: a run that was killed leaves a folder that the next one clears away. A lock
keeps two runs from fetching the same at once. Nothing of the host's own set of packages changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
DEFAULT_MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
ARCHITECTURE = "amd64"

# What scenarios need inside, with what these depend on, as far as the host lacks it.
GUEST_PACKAGES = (
    "bcache-tools",
    "busybox-static",  # the initramfs
    "cryptsetup-bin",
    "dmsetup",
    "lvm2",
    "mdadm",
    "nvme-cli",
    "parted",
    "sg3-utils",  # pass-through commands to SCSI disks
    "thin-provisioning-tools",  # lvm's thin pools, dm-era
)


class FetchError(Exception):
    """What could not be had, with the last words of the tool that failed."""


def cache() -> Path:
    return Path(os.environ.get("BLKTRACK_VM_CACHE") or TOP / ".cache" / "vm").resolve()


@contextlib.contextmanager
def cached(name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """The folder `name` of the cache, made by `make(folder)` where it is missing. FetchError."""
    folder = cache() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    yield folder


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What the tool printed. FetchError with what it said when it fails."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
    except FileNotFoundError as error:
        raise FetchError(f"{error.filename} is not installed: run tools/setup.sh dev") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-500:]
        raise FetchError(f"{' '.join(str(word) for word in command[:3])} failed: {said}")
    return done.stdout


def unpack(archive: Path, root: Path) -> None:
    """Into `root`, where bin, lib and sbin are links into usr, as on every Debian host."""
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE
    ) as packed:
        done = subprocess.run(
            ["tar", "-x", "--keep-directory-symlink", "-C", root],
            stdin=packed.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode or packed.returncode:
        raise FetchError(f"{archive.name} could not be unpacked: {done.stderr.strip()[-300:]}")


class Suite:
    """A release of Debian, read through a configuration of apt that is ours alone."""

    def __init__(self, name: str, folder: Path) -> None:
        """`folder` gets apt's lists; it may be thrown away."""
        self._folder = folder
        for part in ("state/lists/partial", "cache/archives/partial", "parts"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(
            f"deb [signed-by={KEYRING} arch={ARCHITECTURE}] {mirror()} {name} main\n",
            encoding="utf-8",
        )
        self._options = [
            f"Dir::State={folder}/state",
            f"Dir::State::status={folder}/status",
            f"Dir::Cache={folder}/cache",
            f"Dir::Etc::sourcelist={folder}/sources.list",
            f"Dir::Etc::sourceparts={folder}/parts",
            f"Dir::Etc::preferencesparts={folder}/parts",
            f"APT::Architecture={ARCHITECTURE}",
            "Acquire::Languages=none",
            "Acquire::Retries=3",
            "APT::Sandbox::User=root",  # the folder need not be open to the user _apt
        ]
        self._apt("apt-get", "-qq", "update")

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        options = [word for option in self._options for word in ("-o", option)]
        return run(command[0], *options, *command[1:], cwd=cwd)

    def depends(self, package: str) -> list[str]:
        said = self._apt("apt-cache", "depends", "--important", package)
        return [line.split()[1] for line in said.splitlines() if "Depends:" in line]

    def download(self, packages: Sequence[str]) -> list[Path]:
        self._apt("apt-get", "-qq", "download", *packages, cwd=self._folder)
        return sorted(self._folder.glob("*.deb"))


def mirror() -> str:
    """The address that this host has its own Debian packages from."""
    said = run(
        "apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)",
        "Created-By: Packages",
    )  # fmt: skip
    for line in said.splitlines():
        origin, label, address = line.split(" ")
        if origin == label == "Debian" and address.startswith("http"):
            return address
    return DEFAULT_MIRROR


def guest_layer() -> Path:
    """The root of a tree with GUEST_PACKAGES, for the release of Debian that the host has."""
    names = "-".join(run("sh", "-c", ". /etc/os-release; echo $ID $VERSION_ID").split())
    digest = f"{hash_of(GUEST_PACKAGES):08x}"
    with cached(f"packages-{names}-{digest}", _make_layer) as folder:
        return folder


def hash_of(words: Sequence[str]) -> int:
    import zlib

    return zlib.crc32("\n".join(words).encode())


def _make_layer(root: Path) -> None:
    archives = root.with_name(f"{root.name}.debs")
    shutil.rmtree(archives, ignore_errors=True)
    (archives / "partial").mkdir(parents=True)
    run(
        "apt-get", "-qq", "--yes", "--no-install-recommends", "--download-only",
        "-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root",
        # Nothing is installed, so who installs meanwhile need not be waited for.
        "-o", "Debug::NoLocking=1", "install", *GUEST_PACKAGES,
    )  # fmt: skip
    for archive in archives.glob("*.deb"):
        unpack(archive, root)
    shutil.rmtree(archives)
