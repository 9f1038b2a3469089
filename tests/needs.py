"""What a test needs of this machine, found out by trying it.

A probe returns "" when the need is met, otherwise a reason of one clause. Each runs once a session.
A test names its needs with `@pytest.mark.needs("root", "loop")`; conftest.py acts on what is
missing: a skip on a laptop, a failure in CI, where a skipped test would be a hole in the proof.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Probe = Callable[[], str]

LOOP_CTL_GET_FREE = 0x4C82  # linux/loop.h
BPF_PROG_TYPE_RAW_TRACEPOINT = 17  # linux/bpf.h
# A plain user's PATH on Debian has no sbin; tools/setup.sh puts some tools beside Python.
TOOL_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:{Path(sys.executable).parent}"
POSTGRES = "postgres"  # the user that Debian makes for the server, which refuses to run as root
_POSTGRES_BIN = "usr/lib/postgresql/[0-9]*/bin"


def root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def loop() -> str:
    """A free loop device can be had. Needs root: the control device is root's."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/loop-control: {error.strerror}"
    try:
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    except OSError as error:
        return f"no free loop device: {error.strerror}"
    finally:
        os.close(control)
    return "" if Path(f"/dev/loop{number}").exists() else f"/dev/loop{number} does not exist"


def bpf() -> str:
    """The kernel has BTF and takes a tracing program from us, and bcc is there to compile one."""
    if reason := root():
        return reason
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "the kernel has no BTF (/sys/kernel/btf/vmlinux)"
    # To import bcc brings LLVM, which takes an emulated processor two seconds.
    if importlib.util.find_spec("bcc") is None:
        return "no module bcc"
    try:  # bcc's package depends on it; the probe loads a program of two instructions
        probe = ctypes.CDLL("libbpf.so.1", use_errno=True).libbpf_probe_bpf_prog_type
    except OSError as error:
        return f"libbpf: {error}"
    probe.argtypes = [ctypes.c_int, ctypes.c_void_p]
    if probe(BPF_PROG_TYPE_RAW_TRACEPOINT, None) != 1:
        return "the kernel refuses to load a raw tracepoint program"
    return ""


def zram() -> str:
    """A zram device can be added. Removes it again."""
    if reason := root():
        return reason
    control = Path("/sys/class/zram-control")
    if not control.exists() and not load_module("zram"):
        return "the kernel has no zram"
    try:
        number = (control / "hot_add").read_text(encoding="ascii")
        (control / "hot_remove").write_text(number, encoding="ascii")
    except OSError as error:
        return f"zram: {error.strerror}"
    return ""


def io_limit() -> str:
    """Cgroups can be held to a rate of I/O, by the controller of either version."""
    old = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, *_ = line.split(" ")
        control = Path(point) / "cgroup.subtree_control"
        if kind == "cgroup2" and "io" in control.read_text(encoding="ascii").split():
            return ""
    return "" if old.exists() else "no cgroup controller for I/O"


def fuse() -> str:
    """The kernel's side of FUSE; the tests bring their own server."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return ""


def postgres() -> str:
    """A PostgreSQL server with its checkers, and the user it runs as. Needs root to become it."""
    if reason := root():
        return reason
    try:
        programs = postgres_programs()
        pwd.getpwnam(POSTGRES)
    except LookupError as error:
        return str(error.args[0])
    tools = ("initdb", "pg_amcheck", "pg_checksums", "postgres")
    absent = [name for name in tools if not (programs / name).exists()]
    return f"no {', '.join(absent)} in {programs}" if absent else ""


def postgres_programs() -> Path:
    """Where Debian puts the programs of the newest server; they are not in PATH. LookupError."""
    found = {int(path.parts[4]): path.parent for path in Path("/").glob(f"{_POSTGRES_BIN}/initdb")}
    if not found:
        raise LookupError(f"no /{_POSTGRES_BIN}/initdb")
    return found[max(found)]


def netns() -> str:
    """Two network namespaces can be joined by a cable. Leaves nothing."""
    if reason := root() or tool("nsenter"):
        return reason
    try:
        from pyroute2 import NetlinkError

        from tests.netns import pair
    except ImportError as error:
        return f"pyroute2: {error}"
    try:
        with pair():
            return ""
    except (OSError, NetlinkError) as error:
        return f"the kernel makes no two joined namespaces: {error}"


def sshd() -> str:
    """An sshd with the user that Debian makes for it, and root is one that it lets in."""
    if reason := root() or tool("sshd") or tool("ssh") or tool("ssh-keygen"):
        return reason
    try:
        pwd.getpwnam("sshd")
    except KeyError:
        return "no user sshd"
    # sshd(8) on locked accounts; our server is without PAM, which would not mind.
    for line in Path("/etc/shadow").read_text(encoding="utf-8").splitlines():
        if line.startswith("root:!"):
            return "root is locked (passwd -S root)"
    return ""


def filesystem(name: str) -> str:
    """The kernel knows the file system `name` and mkfs can make one."""
    if reason := tool(f"mkfs.{name}"):
        return reason
    known = Path("/proc/filesystems").read_text(encoding="ascii").split()
    return "" if name in known or load_module(name) else f"the kernel has no {name}"


def tool(name: str) -> str:
    return "" if shutil.which(name, path=TOOL_PATH) else f"no {name} in PATH"


def load_module(name: str) -> bool:
    modprobe = shutil.which("modprobe", path=TOOL_PATH)
    if modprobe is None or os.geteuid() != 0:
        return False
    return subprocess.run([modprobe, "-q", name], check=False).returncode == 0


PROBES: dict[str, Probe] = {
    "root": root,
    "loop": loop,
    "bpf": bpf,
    "zram": zram,
    "fuse": fuse,
    "io_limit": io_limit,
    "ext4": functools.partial(filesystem, "ext4"),
    "xfs": functools.partial(filesystem, "xfs"),
    "postgres": postgres,
    "netns": netns,
    "sshd": sshd,
    "cron": functools.partial(tool, "cron"),
    "faketime": functools.partial(tool, "faketime"),
    "systemd": functools.partial(tool, "systemd-analyze"),
    "debhelper": functools.partial(tool, "dh_python3"),
    **{
        name: functools.partial(tool, name)
        for name in (
            "blktrace",
            "debootstrap",
            "depmod",
            "dmsetup",
            "fio",
            "gcc",
            "lintian",
            "lvm",
            "make-bcache",
            "man",
            "mandoc",
            "mdadm",
            "nvme",
            "promtool",
            "qemu-system-x86_64",
            "rsync",
            "sfdisk",
            "sqlite3",
            "tmux",
            "zsh",
        )
    },
}


class Needs:
    """Answers what is missing of the needs in a table of probes, asking each probe once."""

    def __init__(self, probes: Mapping[str, Probe] = PROBES) -> None:
        self._probes = probes
        self._reasons: dict[str, str] = {}

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ValueError where a name has no probe: a typing error must not mean 'met'."""
        if unknown := sorted(set(names) - set(self._probes)):
            raise ValueError(
                f"unknown need: {', '.join(unknown)}; known are {', '.join(sorted(self._probes))}"
            )

    def missing(self, names: Iterable[str]) -> str:
        """What is missing of `names`, "" when nothing is. Raises ValueError for unknown names."""
        names = list(dict.fromkeys(names))
        self.check_names(names)
        reasons = [f"needs {name}: {reason}" for name in names if (reason := self._reason(name))]
        return "; ".join(reasons)

    def _reason(self, name: str) -> str:
        if name not in self._reasons:
            self._reasons[name] = self._probes[name]()
        return self._reasons[name]
