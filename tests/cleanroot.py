"""A root of its own, as debootstrap makes it: the host's Debian release, and nothing else.

Its processes are in a mount and a PID namespace that sees only this root, so that whatever ends
them takes every mount along, and no mount of the host, a test's device perhaps, is held meanwhile.
The first of them reads a pipe of ours: it ends when we do.

Packages come by the host's own apt: its sources, its lists, its cache.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.blockdev import Done, run, wait_until

_CACHE = Path("/var/cache/apt/archives")

# As root and first process of its namespaces, in the folder that is to be the root.
_ENTER = r"""
set -e
[ ! -L proc ] || { rm proc; mkdir proc; }  # where debootstrap takes the host for a container
mount --bind . .
cd "$PWD"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount --bind /etc/apt host/apt
mount --bind /var/lib/apt/lists host/lists
mount --bind /var/cache/apt/archives host/cache
pivot_root . .
umount --lazy .
cd /
exec cat
"""
_APT = [
    word
    for option in ("Etc=/host/apt", "State::lists=/host/lists", "Cache::archives=/host/cache")
    for word in ("-o", f"Dir::{option}")
]


class CleanRoot:
    """A Debian system in `folder`, whose commands run by `run`."""

    def __init__(self, folder: Path, holder: subprocess.Popen[bytes]) -> None:
        self.folder, self._holder = folder, holder

    def run(self, *command: str | Path, code: int = 0) -> Done:
        """A command in it, which has to end with `code`."""
        first = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        pid = first.read_text(encoding="ascii").split()[0]
        enter = ["nsenter", f"--target={pid}", "--mount", "--pid", "--"]
        plain = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        done = subprocess.run(
            [*enter, *(str(word) for word in command)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=plain,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return Done(done.returncode, done.stdout, done.stderr)

    def install(self, *packages: str | Path) -> None:
        """Packages by name or file, with what they depend on."""
        self.run("apt-get", *_APT, "-qq", "-y", "--no-install-recommends", "install", *packages)

    def files(self) -> set[str]:
        """Every path of the root, but of what is mounted in it, caches and logs."""
        passing = ("var/cache/", "var/log/", "host/", "tmp/", "var/lib/apt/", "var/lib/dpkg/")
        command = ["find", ".", "-xdev", "-mindepth", "1", "-printf", r"%P\n"]
        found = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        return {path for path in found if not path.startswith(passing)}


def archive() -> tuple[str, str]:
    """Address and suite of the host's Debian archive, by its own sources."""
    wanted = "$(CODENAME) $(REPO_URI) $(COMPONENT) $(LABEL)"
    lines = run("apt-get", "indextargets", "--format", wanted, "Created-By: Packages").splitlines()
    release = run("sh", "-c", '. /etc/os-release; echo "$VERSION_CODENAME"')
    for line in lines:
        suite, address, component, label = line.split(maxsplit=3)
        if (suite, component) == (release, "main") and label in ("Debian", "Ubuntu"):
            return address, suite
    raise LookupError(f"apt has no list of packages of {release}: run apt-get update")


@contextlib.contextmanager
def clean_root(folder: Path) -> Iterator[CleanRoot]:
    """Made in `folder`, which is to be empty, and gone afterwards."""
    address, suite = archive()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        # Only unpacked by the host: it mounts nothing, and configures nothing, out here.
        base = ("--foreign", "--variant=minbase", f"--cache-dir={_CACHE}")
        run("debootstrap", *base, suite, folder, address)
        for name in ("apt", "lists", "cache"):
            (folder / "host" / name).mkdir(parents=True)
        unsafe = folder / "etc/dpkg/dpkg.cfg.d/unsafe"  # nobody needs this root after a power cut
        unsafe.write_text("force-unsafe-io\n", encoding="ascii")
        holder = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _ENTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        stack.callback(_end, holder)
        root = CleanRoot(folder, holder)
        wait_until(lambda: holder.poll() is not None or _is_in(holder), "the clean root")
        assert holder.poll() is None, "the clean root could not be entered"
        root.run("/debootstrap/debootstrap", "--second-stage")
        # It unmounts what it finds mounted. The bpffs is a new one, not the host's.
        for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("bpf", "/sys/fs/bpf")):
            root.run("sh", "-c", f"mountpoint -q {place} || mount -t {kind} {kind} {place}")
        yield root


def _is_in(holder: subprocess.Popen[bytes]) -> bool:
    """The first process of the namespaces has become the one that waits."""
    try:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text("ascii")
        return Path(f"/proc/{children.split()[0]}/comm").read_text("ascii").strip() == "cat"
    except (OSError, IndexError):
        return False


def _end(holder: subprocess.Popen[bytes]) -> None:
    """The end of its first process ends all of a PID namespace, and with it the mounts."""
    holder.kill()
    holder.wait()
    assert holder.stdin is not None
    holder.stdin.close()
