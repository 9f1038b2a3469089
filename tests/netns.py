"""Network namespaces for tests: a near host and a far one, joined by a cable (a pair of veth).

A process is started in one without a mount namespace of its own, unlike by `ip netns exec`: /sys,
/sys/fs/bpf, the disks and the processes are the same as everywhere, only the network is another.
Addresses are the same in every pair, as each pair sees itself alone.

What a pair is called says which process made it, and since when that process runs. If it was killed
before it could tidy up, the next pair that anybody makes does so in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tests.blockdev import run, wait_until

NEAR, FAR = "10.77.0.1", "10.77.0.2"
_BITS = 24
CLONE_NEWNET = 0x40000000  # linux/sched.h
_FOLDER = Path("/run/netns")  # where ip(8) and pyroute2 keep namespaces that have a name
_OWNED = re.compile(r"blktrack-(\d+)-(\d+)-\d+(?:-near|-far)?")
_MADE = itertools.count(1)


class Host:
    """A network namespace and what runs in it."""

    def __init__(self, name: str, interface: str, address: str) -> None:
        self.name, self.interface, self.address = name, interface, address
        self.path = _FOLDER / name
        self.started: list[subprocess.Popen[Any]] = []

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs here: in a process of the same number."""
        return ("nsenter", f"--net={self.path}")

    def start(self, words: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """A command in the background, which does not outlive the pair. `options` are Popen's."""
        options = {"start_new_session": True, "stdin": subprocess.DEVNULL, **options}
        process = subprocess.Popen([*self.prefix, *(str(word) for word in words)], **options)
        self.started.append(process)
        return process

    def run(
        self, words: Sequence[str | Path], *, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end, its output taken as text. `options` are those of subprocess.run."""
        command = [*self.prefix, *(str(word) for word in words)]
        # An ssh that inherits our standard input makes it non-blocking, for us too.
        own = {} if "input" in options else {"stdin": subprocess.DEVNULL}
        options = {"capture_output": True, "text": True, **own, **options}
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, check=False, timeout=timeout, **options
        )
        return done

    def processes(self) -> set[int]:
        return processes_in(self.path)

    def descendants(self, processes: Iterable[subprocess.Popen[Any]]) -> set[int]:
        """Those of processes() that these are or have started."""
        parents = {pid: parent_of(pid) for pid in self.processes()}
        found = {process.pid for process in processes}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found & parents.keys()

    def end(self) -> None:
        """SIGKILL for everything in it."""
        kill(self.path)
        for process in self.started:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was still to be written is lost
                        stream.close()

    @contextlib.contextmanager
    def network(self) -> Iterator[Any]:
        """pyroute2's view of it. Meanwhile this thread, and what it starts, is in it."""
        # Its own way there, NetNS, forks all of this process, with its handlers of signals.
        from pyroute2 import IPRoute  # takes a quarter of a second, and most test runs need none

        with self.inside(), IPRoute() as found:
            yield found

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is on it meanwhile; its sockets stay there. See setns(2)."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(file: IO[bytes]) -> None:
            if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns", str(self.path))

        with open("/proc/thread-self/ns/net", "rb") as here, self.path.open("rb") as there:
            enter(there)
            try:
                yield
            finally:
                enter(here)

    def set(self, state: str) -> None:
        """Take the interface of the cable "down" or "up"."""
        with self.network() as network:
            network.link("set", index=network.link_lookup(ifname=self.interface)[0], state=state)


@contextlib.contextmanager
def pair() -> Iterator[tuple[Host, Host, Path]]:
    """A near host, a far one and a folder; they end with all that is in them. Needs root."""
    sweep()
    name = f"blktrack-{os.getpid()}-{_start_of(os.getpid())}-{next(_MADE)}"
    with contextlib.ExitStack() as held:
        folder = Path(tempfile.gettempdir()) / name
        folder.mkdir(mode=0o700)
        held.callback(shutil.rmtree, folder)
        near = Host(f"{name}-near", "near0", NEAR)
        far = Host(f"{name}-far", "far0", FAR)
        for host in (near, far):
            held.callback(_remove, host.path)
            _FOLDER.mkdir(exist_ok=True)
            host.path.touch(mode=0o444, exist_ok=False)
            run("unshare", f"--net={host.path}", "true")
            held.callback(host.end)
        _join(near, far)
        yield near, far, folder


def _join(near: Host, far: Host) -> None:
    with near.network() as here, far.network() as there:
        other_end = {"ifname": far.interface, "net_ns_fd": far.name}
        here.link("add", ifname=near.interface, kind="veth", peer=other_end)
        for network, host in ((here, near), (there, far)):
            index = network.link_lookup(ifname=host.interface)[0]
            network.addr("add", index=index, address=host.address, prefixlen=_BITS)
            for each in (index, network.link_lookup(ifname="lo")[0]):
                network.link("set", index=each, state="up")


def leftovers(owner: int | None = None) -> list[Path]:
    """Namespaces and folders of pairs whose process is dead; or of the process `owner`."""
    found = []
    for folder in (_FOLDER, Path(tempfile.gettempdir())):
        for path in folder.glob("blktrack-*"):
            if named := _OWNED.fullmatch(path.name):
                pid, start = map(int, named.groups())
                if pid == owner or (owner is None and _start_of(pid) != start):
                    found.append(path)
    return found


def sweep() -> None:
    """Remove what dead processes left, all at once with others who do the same."""
    for path in leftovers():
        if path.parent == _FOLDER:
            kill(path)
            _remove(path)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _remove(namespace: Path) -> None:
    """What runs in it goes on to have it; whatever another one has removed already is gone."""
    with contextlib.suppress(subprocess.CalledProcessError):
        run("umount", "--lazy", namespace)
    namespace.unlink(missing_ok=True)


def processes_in(namespace: Path) -> set[int]:
    """All processes whose network it is; none of what has ended and waits to be asked why."""
    try:
        wanted = _identity(namespace)
    except OSError:
        return set()
    return {pid for pid in _pids() if _is_in(pid, wanted)}


def kill(namespace: Path, chosen: Callable[[int], bool] = lambda pid: True) -> None:
    """SIGKILL for the processes in it, or those that are `chosen` by number. Gone on return."""

    def gone() -> bool:
        pids = {pid for pid in processes_in(namespace) if chosen(pid)}
        for pid in pids:
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(pid)  # another process may get the number, not the handle
                try:
                    if _is_in(pid, _identity(namespace)):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        return not pids

    wait_until(gone, f"the end of what runs in {namespace}")


def runs(pid: int) -> bool:
    """Not if it has ended, though nobody may have asked why: state Z of proc(5)."""
    return _stat(pid)[0] not in "0ZX"


def parent_of(pid: int) -> int:
    """0 if it has ended."""
    return int(_stat(pid)[1])


def _start_of(pid: int) -> int:
    """When it began, in ticks since boot: with its number that names a process. 0 if it ended."""
    return int(_stat(pid)[19])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state, the third, on: proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ["0"] * 50
    return text.rpartition(")")[2].split()


def _identity(namespace: Path) -> tuple[int, int]:
    status = namespace.stat()
    return status.st_dev, status.st_ino


def _is_in(pid: int, identity: tuple[int, int]) -> bool:
    try:
        return _identity(Path(f"/proc/{pid}/ns/net")) == identity
    except OSError:
        return False


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
