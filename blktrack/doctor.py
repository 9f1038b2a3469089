"""What this host can do, found by trying; each failure with its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from blktrack import durable, sysfs
from blktrack.bpf import install, layout, libbpf
from blktrack.bpf.btf import VMLINUX, Btf
from blktrack.bpf.compile import import_bcc
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Interrupted
from blktrack.report import Check, DoctorReport
from blktrack.ship import ssh

LOCKDOWN = Path("/sys/kernel/security/lockdown")
_OLDEST = (5, 14)


def examine(
    paths: Paths, *, elsewhere: bool = False, programs: Callable[[], object] = install.probe
) -> DoctorReport:
    """All checks, in the order in which one depends on another.

    elsewhere -- there are replicas on other hosts.
    programs -- compiles and loads all of them, and may do more with them.
    """
    checks = [
        _root(),
        _kernel(),
        _lockdown(),
        _libbpf(),
        _bcc(),
        _btf(),
        _bpffs(paths),
        _programs(programs),
        *_probes(),
        _blkid(),
        _state(paths),
        *([_ssh()] if elsewhere else []),
    ]
    return DoctorReport(
        ok=all(check.ok for check in checks), kernel=platform.release(), checks=checks
    )


def _root() -> Check:
    ok = os.geteuid() == 0
    detail = "running as root" if ok else f"running as uid {os.geteuid()}"
    return Check("root", ok, detail, "" if ok else "run blktrack with sudo or as root")


def _kernel() -> Check:
    release = platform.release()
    numbers = [int(n) if n.isdigit() else 0 for n in release.split("-")[0].split(".")[:2]]
    ok = tuple(numbers) >= _OLDEST
    return Check(
        "kernel",
        ok,
        f"Linux {release}",
        "" if ok else "tracking needs Linux 5.14 or newer: install a newer kernel",
    )


def _lockdown() -> Check:
    """Confidentiality lockdown takes from BPF the right to read kernel memory (lockdown(7))."""
    try:
        text = LOCKDOWN.read_text()
    except OSError:
        return Check("lockdown", True, "not locked down")
    mode = text.partition("[")[2].partition("]")[0]
    ok = mode != "confidentiality"
    return Check(
        "lockdown",
        ok,
        f"lockdown is {mode or 'none'}",
        "" if ok else "boot with lockdown=integrity, or without Secure Boot's confidentiality mode",
    )


def _try(name: str, good: str, attempt: Callable[[], object], remedy: str) -> Check:
    try:
        attempt()
    except Interrupted:
        raise
    except BlktrackError as error:
        return Check(name, False, str(error), error.hint if name == "btf" else remedy)
    except (OSError, ImportError) as error:
        return Check(name, False, str(error), remedy)
    return Check(name, True, good)


def _libbpf() -> Check:
    return _try("libbpf", libbpf.SONAME, libbpf.library, "apt-get install python3-bpfcc")


def _bcc() -> Check:
    return _try(
        "bcc",
        "the system's bcc can be imported",
        import_bcc,
        "apt-get install python3-bpfcc, and run blktrack with the system's Python "
        f"(this is {sys.executable})",
    )


def _btf() -> Check:
    if not VMLINUX.exists():
        return Check(
            "btf",
            False,
            f"{VMLINUX} is not there: the kernel carries no type information",
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF, as all of Debian's and Ubuntu's are",
        )

    def attempt() -> None:
        btf = Btf()
        try:
            layout.constants(btf)
        finally:
            btf.close()

    return _try("btf", "the kernel's types are as needed", attempt, "boot a supported kernel")


def _bpffs(paths: Paths) -> Check:
    where = paths.pins.parent
    ok = sysfs.filesystem_at(where) == "bpf"
    return Check(
        "bpffs",
        ok,
        f"mounted on {where}" if ok else f"not mounted on {where}",
        "" if ok else f"mount -t bpf bpf {where} (blktrack track does so by itself)",
    )


def _programs(attempt: Callable[[], object]) -> Check:
    return _try(
        "programs",
        "all tracking programs compile and load",
        attempt,
        "mend the failures above; if there is none, report this kernel",
    )


def _probes() -> list[Check]:
    """Where programs can be preempted it matters whether there are any."""
    try:
        btf = Btf()
    except (OSError, BlktrackError):  # said above
        return []
    try:
        if not layout.preemptible(btf):
            return []
        found = bool(layout.cast(btf))
    finally:
        btf.close()
    return [
        Check(
            "kprobes",
            True,
            "changes are seen to begin by kprobes, as this kernel preempts programs"
            if found
            else "there are none (CONFIG_KPROBE_EVENTS), and this kernel preempts programs: tasks "
            "that keep a processor busy with writing to LVM, md or zram may lead to resyncs",
        )
    ]


def _blkid() -> Check:
    found = shutil.which("blkid", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Check(
        "blkid",
        found is not None,
        found or "blkid is not installed; it tells what a target holds",
        "" if found else "apt-get install util-linux",
    )


def _ssh() -> Check:
    return _try(
        "ssh",
        "replicas on other hosts are reached by it",
        ssh.check,
        "apt-get install openssh-client",
    )


def _state(paths: Paths) -> Check:
    def attempt() -> None:
        for place in (paths.run, paths.lib):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place) as folder:
                durable.write_json(Path(folder) / "probe", {})

    return _try(
        "state",
        f"{paths.run} and {paths.lib} can be written",
        attempt,
        "make them writable, or set BLKTRACK_ROOT to a place that is",
    )
