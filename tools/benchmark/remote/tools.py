"""Other ways to bring a file on another host to what a source holds: they read all of both."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.benchmark.lab import HERE, Disk
from tools.benchmark.remote.hosts import Hosts

Command = Callable[[Hosts, Disk, Path], tuple[str, ...]]


@dataclass(frozen=True)
class Tool:
    name: str
    what: str  # of it is run, for who reads the figures
    command: Command  # to be run on the near host


def _rsync(*options: str) -> Tool:
    words = ("rsync", "--inplace", "--no-whole-file", "--ignore-times", *options)

    def command(hosts: Hosts, source: Disk, target: Path) -> tuple[str, ...]:
        return (*words, "-e", hosts.ssh_line, str(source.image), f"{hosts.far}:{target}")

    return Tool(" ".join(["rsync", *options]), f"`{' '.join(words)}`", command)


def _bdsync(hosts: Hosts, source: Disk, target: Path) -> tuple[str, ...]:
    ssh = f"{hosts.ssh_line} {hosts.far}"
    patch = shlex.quote(f"bdsync --patch={target}")
    line = f"bdsync {shlex.quote(f'{ssh} bdsync --server')} {source.image} {target} | {ssh} {patch}"
    return ("bash", "-o", "pipefail", "-c", line)


def _digests(hosts: Hosts, source: Disk, target: Path) -> tuple[str, ...]:
    inside = (sys.executable, "-S", str(HERE / "remote" / "digests.py"), "sync")
    return (*inside, str(source.image), str(target), *hosts.ssh, hosts.far)


RSYNC, RSYNC_Z = _rsync(), _rsync("-z")
RSYNC_4K = _rsync("--block-size=4096")
BDSYNC = Tool("bdsync", "`bdsync SOURCE TARGET | ssh … bdsync --patch`, its defaults", _bdsync)
SCHEME = Tool(
    "bdsync's scheme",
    "digests of all blocks of 4 KiB from the far host, the blocks that differ to it: a program of "
    "this benchmark's, as bdsync is in few distributions and not in PATH here",
    _digests,
)


def others() -> list[Tool]:
    return [RSYNC, RSYNC_Z, BDSYNC if shutil.which("bdsync") else SCHEME]
