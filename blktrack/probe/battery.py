"""All probes on a device of each kind, and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from blktrack.bpf import abi, layout
from blktrack.bpf.btf import Btf
from blktrack.bpf.install import install
from blktrack.bpf.kernel import Kernel
from blktrack.device import bypasses_bios
from blktrack.observer import NOBODY, Observer
from blktrack.probe.bench import Bench, Unseen
from blktrack.probe.devices import KINDS, Absent, Kind, make
from blktrack.probe.probes import PROBES, ROOM, Probe
from blktrack.probe.room import Room
from blktrack.report import Probed, ProbedKind, ProbeReport
from blktrack.sysfs import BlockDevice

PASSED, FAILED, ABSENT = "passed", "failed", "not here"
TRUSTED, NOT_TRUSTED, NOT_PROBED = "trusted", "not trusted", "not probed"
# A host may have a completion that no program runs for (account.py): tracking covers those, so only
# what goes unseen every time is a failure.
_TRIES = 3
_CODES = {"request": abi.KIND_REQUEST, "bio": abi.KIND_BIO}


def never() -> None:
    """Nobody asks for an early end."""


def run(
    kinds: Sequence[Kind] = KINDS,
    probes: Sequence[Probe] = PROBES,
    observer: Observer = NOBODY,
    stop: Callable[[], None] = never,
    keep: Callable[[Path], object] | None = None,
) -> ProbeReport:
    """Try all of it. BlktrackError if the programs cannot be had; whatever `stop` raises.

    stop -- called where ending is safe, to raise what ends it.
    keep -- may take over the pins of programs that nothing speaks against, in an instance without
        devices: to compile and verify them takes longer than all probes together.
    """
    begun = time.monotonic()
    codes = sorted({_CODES[kind.based] for kind in kinds})
    with Room(observer) as room:
        with ExitStack() as held:
            kernel = cache(lambda: held.enter_context(install(room.pins, *codes)))
            started = _Run(room, kernel, observer, stop)
            found = [started.kind(kind, probes) for kind in kinds]
            ok = not any(probe.result == FAILED for kind in found for probe in kind.probes)
            probed = any(kind.verdict != NOT_PROBED for kind in found)
            if probed:
                kernel().free_all()
        if keep and ok and probed:
            keep(room.pins)
    return ProbeReport(ok, time.monotonic() - begun, found)


@dataclass(frozen=True)
class _Run:
    room: Room
    kernel: Callable[[], Kernel]  # the programs, loaded when they are first needed
    observer: Observer
    stop: Callable[[], None]

    def kind(self, kind: Kind, probes: Sequence[Probe]) -> ProbedKind:
        with ExitStack() as held:
            self._step(kind, "making a scratch device")
            try:
                device = make(kind, self.room, held)
                if device.request_based != (kind.based == "request"):
                    # null_blk since Linux 6.10 (8b631f9cf0b8)
                    raise Absent(f"on this kernel such a device is not {kind.based}-based")
            except Absent as error:
                done = [Probed(probe.name, ABSENT, str(error)) for probe in probes]
                return ProbedKind(kind.name, kind.based, NOT_PROBED, str(error), done)
            bench = Bench(self.room, self.kernel(), device, held)
            done = []
            for number, probe in enumerate(probes):
                self._step(kind, probe.told)
                done.append(_probe(bench, probe, number * _TRIES * ROOM))
        failed = [f"{probe.name}: {probe.reason}" for probe in done if probe.result == FAILED]
        reason = "; ".join(failed) or _refused(device)
        return ProbedKind(kind.name, kind.based, NOT_TRUSTED if reason else TRUSTED, reason, done)

    def _step(self, kind: Kind, name: str) -> None:
        self.observer.phase(f"probing {kind.name}: {name}", 0)
        self.stop()


def _probe(bench: Bench, probe: Probe, place: int) -> Probed:
    reason = ""
    for turn in range(_TRIES):
        bench.watched.begin()
        try:
            bench.watched.check(probe.run(bench, place + turn * ROOM))
        except Unseen as error:
            reason = str(error)
        except Absent as error:
            return Probed(probe.name, ABSENT, str(error))
        except OSError as error:
            return Probed(probe.name, FAILED, f"the device refused it ({error.strerror})")
        else:
            return Probed(probe.name, PASSED, "")
    return Probed(probe.name, FAILED, reason)


def _refused(device: BlockDevice) -> str:
    """Why such a device is not tracked although what was tried was seen."""
    if not bypasses_bios(device):
        return ""
    with closing(Btf()) as btf:
        if layout.has_rw_page(btf):
            return "this kernel can write it page by page past the block layer (before Linux 6.3)"
    return ""
