"""The programs and maps of one blktrack instance, pinned in bpffs so that they outlive processes.

    PINS/TEXT/windows planes stats …           the shared maps (abi.MAPS)
    PINS/TEXT/link_NAME, link_NAME_2 …         an attached program each, and its copies (layout.py)
    PINS/TEXT/slot_N_a, slot_N_b               the two inner maps of the device in slot N

TEXT is the fingerprint of the program text, so that another version of blktrack never reads maps
that it does not understand; installing one takes the other away.

Made in this order, undone in reverse: maps, then programs, then a slot. A death in between leaves
less than a whole; opening it then tells what is missing and `install` makes it anew.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from blktrack.bpf import abi, libbpf, structs
from blktrack.bpf.compile import fingerprint
from blktrack.bpf.planes import Geometry, Planes, Reading, possible_cpus, stats_reader
from blktrack.bpf.programs import BY_KIND, Program, pinned_copies
from blktrack.bpf.windows import Window, Windows
from blktrack.errors import BlktrackError
from blktrack.units import format_size


class Detached(BlktrackError):
    """Something that tracking needs is no longer in the kernel or no longer pinned."""


def _missing(what: str, error: OSError | ValueError) -> BlktrackError:
    """Detached, unless it is this process that lacks something: that is no doubt."""
    number = error.errno if isinstance(error, OSError) else 0
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM):
        return BlktrackError(
            f"cannot open what tracking has in the kernel: {os.strerror(number)}",
            hint="let it have more open files (ulimit -n), more memory, or all rights of root",
        )
    return Detached(f"{what} ({error})")


def _key(number: int) -> bytes:
    return ct.c_uint32(number).value.to_bytes(4, "little")


class Kernel:
    """Open pins below `root`. Detached if they are not all there."""

    def __init__(self, root: Path, *, writable: bool = True) -> None:
        self.root = root
        self.pins = pins = root / fingerprint()
        self._fds: dict[str, int] = {}
        try:
            for name in abi.MAPS:
                self._fds[name] = libbpf.open_pin(f"{pins}/{name}")
        except OSError as error:
            self.close()
            raise _missing(f"the tracking maps are gone from {pins}", error) from error
        self.windows = Windows(self._fds["windows"], writable=writable)

    def programs(self, kind: int) -> dict[str, Program]:
        """The attached programs for a kind of device. Detached if a pin is missing."""
        begins, ends = BY_KIND[kind]
        return {
            begins: self._program(begins, lambda: self.caught(kind)),
            ends: self._program(ends, None),
        }

    def caught(self, kind: int) -> int:
        """Events that the first of several copies was not run for, but a later one was."""
        raw = libbpf.lookup(self._fds["caught"], _key(kind), 8)
        assert raw is not None  # an array has all its elements
        return int.from_bytes(raw, "little", signed=True)

    def _program(self, name: str, caught: Callable[[], int] | None) -> Program:
        links: list[int] = []
        programs: list[int] = []
        try:
            for copy in pinned_copies(self.pins, name):
                try:
                    link = libbpf.open_pin(f"{self.pins}/link_{copy}")
                except OSError as error:
                    raise _missing(f"program {copy} is no longer pinned", error) from error
                try:
                    info = libbpf.info(link, structs.LinkInfo)
                    programs.append(libbpf.program_by_id(info.prog_id))
                    links.append(info.id)
                finally:
                    os.close(link)
            return Program.look(links, programs, caught)
        finally:
            for program in programs:
                os.close(program)

    def add(self, window: Window, *, settled: bool = False) -> int:
        """Give a device a slot with two empty inner maps and zero counters, active at once."""
        slot, geometry = self.windows.free_slot(), window.geometry
        fds = []
        try:
            for letter in "ab":
                (self.pins / f"slot_{slot}_{letter}").unlink(missing_ok=True)
                fds.append(create_inner(geometry))
                libbpf.pin(fds[-1], self.pins / f"slot_{slot}_{letter}")
            libbpf.update(self._fds["planes"], _key(slot), _key(fds[0]))
        except OSError as error:
            raise BlktrackError(
                f"cannot make the dirty maps ({format_size(2 * geometry.map_bytes)} of kernel "
                f"memory): {os.strerror(error.errno or 0)}",
                hint="free memory, choose a larger --granularity, or see blktrack doctor",
            ) from error
        finally:
            for fd in fds:
                os.close(fd)
        libbpf.update(self._fds["stats"], _key(slot), bytes(possible_cpus() * abi.STATS.itemsize))
        self.windows.set(slot, window, settled=settled)
        return slot

    def settle(self, slot: int, active: Planes) -> None:
        """From here on a bio that ends without having been seen to begin is a loss.

        The kernel counts a bio as ended just before the program runs on it: what is on its way
        there is waited for, as by any swap.
        """
        self.swap(slot, active)
        self.windows.settle(slot)

    def remove(self, slot: int) -> None:
        """Free a slot; the last one of its kind takes the programs with it."""
        self.free(slot)
        for kind, names in BY_KIND.items():
            if not self.windows.used(kind):
                for name in names:
                    for copy in pinned_copies(self.pins, name):
                        (self.pins / f"link_{copy}").unlink(missing_ok=True)
        self.drop_unused()

    def free(self, slot: int) -> None:
        """Free a slot, and leave the programs where they are."""
        self.windows.clear(slot)
        libbpf.delete(self._fds["planes"], _key(slot))  # waits for running programs
        for letter in "ab":
            (self.pins / f"slot_{slot}_{letter}").unlink(missing_ok=True)

    def free_all(self) -> None:
        for slot in range(abi.SLOTS):
            if self.windows.window(slot):
                self.free(slot)

    def drop_unused(self) -> None:
        """Without a slot in use, everything goes."""
        if not any(map(self.windows.used, BY_KIND)):
            remove(self.root)

    def planes(self, slot: int, geometry: Geometry) -> tuple[Planes, Planes]:
        """The active and the retired inner map of a slot."""
        both = []
        try:
            for letter in "ab":
                fd = libbpf.open_pin(self.pins / f"slot_{slot}_{letter}")
                self._fds[f"slot_{slot}_{letter}"] = fd
                both.append(Planes(fd, geometry))
        except (OSError, ValueError) as error:
            raise _missing(f"the dirty maps of slot {slot} are no longer pinned", error) from error
        active = self.active_map(slot)
        if active not in (both[0].id, both[1].id):
            raise Detached(f"slot {slot} has another dirty map than the pinned ones")
        return (both[0], both[1]) if active == both[0].id else (both[1], both[0])

    def active_map(self, slot: int) -> int:
        """The id of the inner map that the programs mark for a slot; 0 if it has none."""
        raw = libbpf.lookup(self._fds["planes"], _key(slot), 4)
        return int.from_bytes(raw, "little") if raw else 0

    def swap(self, slot: int, retired: Planes) -> None:
        """Make the (clear) retired map active. On return no program touches the other any more."""
        libbpf.update(self._fds["planes"], _key(slot), _key(retired.fd))

    def stats(self, slot: int) -> dict[str, int]:
        return self.stats_reader(slot)()()

    def stats_reader(self, slot: int) -> Callable[[], Reading]:
        return stats_reader(self._fds["stats"], slot)

    @property
    def maps(self) -> dict[str, int]:
        """Descriptors of the shared maps."""
        return {name: self._fds[name] for name in abi.MAPS}

    def in_flight(self, disk: int) -> NDArray[Any]:
        """Changes of a bio-based disk that were seen to begin and not to end (abi.BIO)."""
        copied = len(pinned_copies(self.pins, BY_KIND[abi.KIND_BIO][0])) > 1
        with _unpreempted() if copied else contextlib.nullcontext():
            raw = libbpf.values(self._fds["inflight"], 8, abi.BIO.itemsize)
        found: NDArray[Any] = np.frombuffer(raw, dtype=abi.BIO)
        ours: NDArray[Any] = found[found["dev"] == disk]
        return ours

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _unpreempted() -> Iterator[None]:
    """Real time for a thread that is about to go through a large map: until the kernel is through,
    it runs no probes on that CPU (layout.py, preemptible)."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(PermissionError):  # then copies have to see what the probes do not
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def create_inner(geometry: Geometry) -> int:
    flags = libbpf.F_MMAPABLE | libbpf.F_INNER_MAP
    return libbpf.create_map(
        libbpf.MAP_ARRAY, "blktrack_planes", 4, 8, 2 * geometry.plane_words, flags=flags
    )


def remove(root: Path) -> None:
    """Unpin everything: programs first, so that none runs on half a set of maps."""
    if not root.is_dir():
        return
    for pins in root.iterdir():
        for path in sorted(pins.iterdir(), key=lambda p: not p.name.startswith("link_")):
            path.unlink(missing_ok=True)
        pins.rmdir()
    root.rmdir()
