"""An incremental sync to another host, next to tools that find what changed by reading all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blktrack.units import GIB, MIB, format_size
from tools.benchmark.figure import Figure, Run, medians
from tools.benchmark.lab import Disk, Lab, same
from tools.benchmark.remote.changes import MIXED, Changes, Maker, lent, put
from tools.benchmark.remote.hosts import Hosts, shaped, two_hosts
from tools.benchmark.remote.tools import RSYNC_4K, Tool, others
from tools.benchmark.replicate import order

_LINKS = {"1 Gbit/s, 1 ms": shaped(1000, 1), "50 Mbit/s, 40 ms": shaped(50, 40)}
_OURS = "blktrack"


def measure(lab: Lab, name: str, *, quick: bool) -> Iterator[Figure]:
    size, rounds = (512 * MIB, 1) if quick else (4 * GIB, 3)
    lab.need(3 * size)
    with (
        tempfile.TemporaryDirectory(prefix="far-", dir=lab.memory) as folder,
        lab.device(size) as source,
        lab.tracked(source),
        two_hosts() as hosts,
    ):
        pair = _Pair(hosts, source, Path(folder))
        for link, shape in _LINKS.items():
            hosts.link.shape(shape)
            yield from pair.figures(name, link, rounds)


class _Pair:
    """A source, and two replicas of it on the far host: one of blktrack's, one of all others'."""

    def __init__(self, hosts: Hosts, source: Disk, folder: Path) -> None:
        self.hosts, self.source = hosts, source
        self.ours, self.theirs = folder / "ours", folder / "theirs"
        self._make = Maker()
        shutil.copyfile(source.image, self.theirs)
        self._sync()

    def figures(self, name: str, link: str, rounds: int) -> Iterator[Figure]:
        tools = others()
        runs = [self._round(tools, number) for number in range(rounds)]
        parts = {**medians(runs), **self._once(RSYNC_4K)}
        note = (
            f"{format_size(self.source.size)}, 1 % changed, {MIXED}; all tools the same changes. "
            "`blktrack sync --quiet` of a loop device in memory, the others of the file behind it, "
            "each to a file in memory on the far host, from the start of the process to its exit; "
            "bytes of both directions; replicas compared after each"
        )
        for unit in ("seconds", "bytes"):
            word = {"seconds": "time", "bytes": "bytes on the wire"}[unit]
            for tool in tools:
                yield Figure(
                    name,
                    f"{link}: {word} of {tool.name} / of blktrack",
                    values=[run[f"{tool.name}, {unit}"] / run[f"{_OURS}, {unit}"] for run in runs],
                    note=f"{note}. {tool.name}: {tool.what}",
                    parts=parts,
                    runs=runs,
                )
            # The last of them finds changes by digests too.
            yield Figure(
                name,
                f"{link}: {word} of {tools[-1].name} / of blktrack's resync",
                values=[run[f"{tools[-1].name}, {unit}"] / run[f"resync, {unit}"] for run in runs],
                note="as above, but 1 % of blktrack's replica is changed behind its back, and found"
                " by digests",
                parts=parts,
                runs=runs,
            )
        yield Figure(
            name,
            f"{link}: sync of nothing",
            unit="s",
            values=[run["nothing, seconds"] for run in runs],
            note="from the start of the process to its exit, with ssh's login",
            parts=parts,
            runs=runs,
        )

    def _round(self, tools: list[Tool], number: int) -> Run:
        """All tools from the same state to the same; then a resync, and a sync of nothing."""
        changes = self._change()
        found: Run = {}
        for tool in order([None, *tools], number):
            if tool is None:
                found |= _named(_OURS, self._sync())
            else:
                found |= _named(tool.name, self._other(tool, changes))
        put(self.theirs, changes)
        put(self.ours, self._make.mixed(self.source.size, self.source.size // 100))
        return found | _named("resync", self._sync()) | _named("nothing", self._sync())

    def _once(self, tool: Tool) -> Run:
        """Another tool, for comparison."""
        changes = self._change()
        found = _named(tool.name, self._other(tool, changes))
        put(self.theirs, changes)
        self._sync()
        return found

    def _change(self) -> Changes:
        changes = self._make.mixed(self.source.size, self.source.size // 100)
        put(self.source, changes)
        return changes

    def _sync(self) -> Run:
        done = self.hosts.sync(self.source, self.ours)
        self._check(self.ours)
        return done

    def _other(self, tool: Tool, changes: Changes) -> Run:
        with lent(self.theirs, changes):
            command = tool.command(self.hosts, self.source, self.theirs)
            done = self.hosts.timed(*self.hosts.near(*command))
            self._check(self.theirs)
        return done

    def _check(self, replica: Path) -> None:
        same(self.source, Disk(str(replica), replica, self.source.size))


def _named(name: str, run: Run) -> Run:
    return {f"{name}, {key}": run[key] for key in ("seconds", "bytes")}
