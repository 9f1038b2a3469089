"""The kernel's side for who only looks: kept open, mapped read-only, opened anew if it was remade.

No link is held open, as that would keep a program attached whose pin is gone: it is opened for a
moment when its pin is first seen, and its program, which a descriptor keeps in memory and nothing
more, is asked from then on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blktrack.bpf import libbpf, structs
from blktrack.bpf.compile import fingerprint
from blktrack.bpf.kernel import Detached, Kernel
from blktrack.bpf.planes import Geometry, Planes
from blktrack.bpf.programs import BY_KIND, Program, copies_of

Stamp = tuple[int, int]


def _stamp(path: Path) -> Stamp | None:
    """Tells one pin from another of its name; None if nothing is pinned there."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_ctime_ns


@dataclass
class _Attached:
    stamp: Stamp
    link_id: int
    program: int  # descriptor


@dataclass(frozen=True)
class Cost:
    """What the programs of one kind took between two refreshes, by the kernel's own clock."""

    change_ns: float  # a run of the one that sees a change begin and one of that which sees it end
    run_ns: int  # all runs together


class View:
    """What `refresh` found, until the next."""

    def __init__(self, root: Path) -> None:
        self._pins = root / fingerprint()
        self._root = root
        self._kernel: Kernel | None = None
        self._stamp: Stamp | None = None
        self._attached: dict[str, _Attached] = {}
        self._programs: dict[str, Program] = {}
        self._before: dict[str, Program] = {}

    def refresh(self) -> None:
        stamp = _stamp(self._pins / "windows")
        if stamp != self._stamp or self._kernel is None:
            self.close()
            try:
                self._kernel = Kernel(self._root, writable=False)
            except Detached:
                return
            self._stamp = stamp
        self._before, self._programs = self._programs, {}
        for kind, (begins, ends) in BY_KIND.items():
            for name, caught in ((begins, partial(self._kernel.caught, kind)), (ends, None)):
                if copies := list(self._copies(name)):
                    links, programs = zip(*copies, strict=True)
                    self._programs[name] = Program.look(links, programs, caught)

    @property
    def kernel(self) -> Kernel:
        """Detached if the maps are not there."""
        if self._kernel is None:
            raise Detached(f"the tracking maps are gone from {self._pins}")
        return self._kernel

    def programs(self, kind: int) -> dict[str, Program]:
        """The attached programs for a kind of device. Detached if a pin is missing."""
        for name in BY_KIND[kind]:
            if name not in self._programs:
                raise Detached(f"program {name} is no longer pinned")
        return {name: self._programs[name] for name in BY_KIND[kind]}

    def cost(self, kind: int) -> Cost | None:
        """None if the kernel timed no runs of both: it counts none, or there were none."""
        change, total = 0.0, 0
        for name in BY_KIND[kind]:
            now, before = self._programs.get(name), self._before.get(name)
            if now is None or before is None or now.links != before.links:
                return None
            runs, run_ns = now.runs - before.runs, now.run_ns - before.run_ns
            if runs <= 0:
                return None
            change += run_ns / runs
            total += run_ns
        return Cost(change, total)

    def planes(self, slot: int, geometry: Geometry) -> list[Planes]:
        """Both inner maps of a slot, in the order of their pins. Detached if they are not there."""
        both = []
        for letter in "ab":
            try:
                fd = libbpf.open_pin(self._pins / f"slot_{slot}_{letter}")
                try:
                    planes = Planes(fd, geometry, writable=False)
                    assert planes.id  # asked for while the descriptor is open; the mapping stays
                finally:
                    os.close(fd)
            except (OSError, ValueError) as error:
                raise Detached(f"the dirty maps of slot {slot} are no longer pinned") from error
            both.append(planes)
        return both

    def _copies(self, name: str) -> Iterator[tuple[int, int]]:
        """Link id and program of each."""
        for copy in copies_of(name):
            found = self._program(copy)
            if found is None:
                return
            yield found

    def _program(self, name: str) -> tuple[int, int] | None:
        path = self._pins / f"link_{name}"
        stamp, known = _stamp(path), self._attached.get(name)
        if known is not None and known.stamp != stamp:
            os.close(self._attached.pop(name).program)
            known = None
        if stamp is None:
            return None
        if known is None:
            try:
                link = libbpf.open_pin(path)
                try:
                    info = libbpf.info(link, structs.LinkInfo)
                    known = _Attached(stamp, info.id, libbpf.program_by_id(info.prog_id))
                finally:
                    os.close(link)
            except OSError:  # gone since
                return None
            self._attached[name] = known
        return known.link_id, known.program

    def close(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
        for attached in self._attached.values():
            os.close(attached.program)
        self._kernel, self._stamp = None, None
        self._attached, self._programs, self._before = {}, {}, {}
