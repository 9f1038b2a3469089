"""The programs under stress, and each way to lose a mark: found, named, repaired once."""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest

from blktrack.bpf import abi, compile, layout, libbpf
from blktrack.bpf.btf import Btf
from blktrack.bpf.kernel import Kernel
from blktrack.bpf.programs import BY_KIND, Program
from blktrack.tracker import tracker
from blktrack.tracker.tracking import Gap
from blktrack.units import KIB, MIB, format_size
from tests import sectors
from tests.blockdev import (
    Lab,
    flush,
    read_image,
    resize,
    told,
    wait_until,
    write_direct,
)
from tests.oracle import fill, missed
from tests.test_exact import merged_discards, zero_out
from tests.test_retired import load
from tests.workload import fio, next_sequence, raw_activity, together

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 32 * MIB
kinds = pytest.mark.parametrize(
    "kind", ["loop-512", pytest.param("zram", marks=pytest.mark.needs("zram"))]
)


@contextmanager
def other_programs() -> Iterator[Callable[[], int]]:
    """What other tools attach to the tracepoints of ours: how often bcc's have run, as a function.

    Typed raw tracepoints that do nothing, before and after one of bcc that counts by process.
    """
    bpf, _ = compile.import_bcc()
    counting = "BPF_HASH(seen, u32, u64, 4096);\nint count(void *ctx)\n{\n"
    counting += "\tu32 pid = bpf_get_current_pid_tgid();\n\tseen.increment(pid);\n\treturn 0;\n}\n"
    empty = "".join(f"int {name}(u64 *ctx)\n{{\n\treturn 0;\n}}\n" for name in layout.PROGRAMS)
    code = compile.compile_programs(abi.c_header() + empty)
    with ExitStack() as stack:
        btf = Btf()
        stack.callback(btf.close)

        def attach_empty() -> None:
            for name, tracepoint in layout.PROGRAMS.items():
                program = libbpf.load_program(name, code[name], btf.tracepoint(tracepoint))
                stack.callback(os.close, program)
                stack.callback(os.close, libbpf.attach(program))

        attach_empty()
        module = bpf(text=counting.encode())
        stack.callback(module.cleanup)
        for tracepoint in set(layout.PROGRAMS.values()):
            module.attach_raw_tracepoint(tp=tracepoint.encode(), fn_name=b"count")
        attach_empty()
        yield lambda: sum(ct.c_uint64(value.value).value for value in module[b"seen"].values())


def under_stress(lab: Lab, seed: int, rounds: int) -> None:
    devices = [lab.loop(SIZE), lab.zram(SIZE), lab.loop(SIZE)]
    for device in devices:
        fill(device)
    watches = [lab.track(device) for device in devices[:2]]
    cpus = os.cpu_count() or 1
    jobs = ["--rw=randwrite", "--bs=4k", f"--numjobs={cpus}", "--number_ios=2000"]
    doubts = differ = 0
    with other_programs() as runs:
        before = [read_image(device) for device in devices[:2]]
        for number in range(rounds):
            works: list[Callable[[], None]] = [
                partial(raw_activity, [device], seed + 100 * number + 10 * n, 40)
                for n, device in enumerate(devices)
            ]
            works += [partial(fio, device, *jobs) for device in devices]
            together(works)
            for device in devices:
                flush(device)
            for n, watch in enumerate(watches):
                after = read_image(watch.path)
                try:
                    tracked = watch.take()
                except Gap as gap:
                    # Not what is expected of this machine, and nothing lost in silence either.
                    told(f"{watch.path} under stress: {gap}")
                    doubts += 1
                    watches[n] = lab.track(watch.path)
                else:
                    lost = missed(before[n], after, tracked)
                    assert not len(lost), f"{watch.path}: {len(lost)} sectors, first {lost[:8]}"
                    differ += len(sectors.differing(before[n], after)) * 512
                before[n] = after
        assert runs() > 4 * 2000, "the other programs ran as well"
    told(
        f"all {cpus} CPUs writing to two tracked devices and another one, with nine programs more: "
        f"{format_size(differ)} differ, all of it tracked, {doubts} doubts"
    )


@pytest.mark.needs("zram", "fio")
def test_under_stress_every_mark_is_present(shared: Lab, seed: int) -> None:
    under_stress(shared, seed, 2)


@pytest.mark.soak
@pytest.mark.needs("zram", "fio")
def test_under_stress_every_mark_is_present_for_long(shared: Lab, seed: int) -> None:
    under_stress(shared, seed, 40)


class Pair:
    """A tracked device and its replica, at rest and identical."""

    def __init__(self, lab: Lab, kind: str) -> None:
        self.lab = lab
        self.file = lab.name("disk")
        self.device = lab.zram(SIZE) if kind == "zram" else lab.loop(SIZE, file=self.file)
        self.replica = str(lab.name("replica"))
        fill(self.device)
        tracker.track(lab.store, self.device, None)
        lab.sync(self.device, self.replica)
        self._past = len(lab.status(self.device)["doubts"])  # of another device of its name

    def write(self, offset: int, length: int = 4 * KIB) -> None:
        write_direct(self.device, offset, sectors.make(offset, length, next_sequence()))

    def is_resynced_once(self, reason: str) -> None:
        """The doubt is found, named, and over with one resync."""
        before = self.lab.status(self.device)["generation"]
        refused = self.lab.blktrack("sync", self.device, self.replica, "--no-resync")
        assert refused.code == 3, refused
        assert reason in refused.err
        found = self.lab.status(self.device)
        (link,) = (link for link in found["links"] if link["target"] == self.replica)
        assert (found["state"], link["state"]) == ("gap", "resync")
        assert reason in found["reason"]
        assert found["since"] == found["doubts"][0]["time"]
        done = self.lab.sync(self.device, self.replica)
        assert done.mode == "resync"
        assert reason in done.reason
        self.is_identical()
        self.goes_on(doubts=1)
        assert self.lab.status(self.device)["generation"] not in ("", before)

    def goes_on(self, *, doubts: int = 0) -> None:
        """The next change is replicated alone."""
        self.write(3 * MIB)
        done = self.lab.sync(self.device, self.replica)
        assert (done.mode, done.bytes_changed) == ("incremental", 4 * KIB), done
        self.is_identical()
        found = self.lab.status(self.device)
        assert (found["state"], found["losses"]) == ("tracking", 0)
        assert len(found["doubts"]) - self._past == doubts, found["doubts"]

    def is_identical(self) -> None:
        found = sectors.faults(read_image(self.device), read_image(self.replica))
        assert not found, sectors.describe(found)

    def doubts(self) -> int:
        """So many as any command has found by now."""
        return len(self.lab.status(self.device)["doubts"]) - self._past


@pytest.mark.needs("zram", "fio")
def test_a_full_table_of_what_is_in_flight(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPUs write at once, and it has room for one bio."""
    with monkeypatch.context() as patch:
        patch.setattr(abi, "INFLIGHT", 1)
        pair = Pair(lab, "zram")
        with load(pair.device, "--time_based", "--runtime=1h"):
            wait_until(lambda: pair.doubts() > 0, "two bios in flight at once")
    pair.is_resynced_once("could not be remembered until their completion")


@kinds
def test_a_command_that_the_programs_do_not_know(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Zeroing is a real one once they have not been told of it."""
    with monkeypatch.context() as patch:
        known = tuple(name for name in layout._CHANGES if name != "WRITE_ZEROES")
        patch.setattr(layout, "_CHANGES", known)
        pair = Pair(lab, kind)
    before = read_image(pair.device)
    zero_out(pair.device, MIB, 64 * KIB)
    assert len(sectors.differing(before, read_image(pair.device))) == 128
    assert pair.doubts() == 1
    pair.is_resynced_once("1 pass-through or unknown commands")


def test_a_discard_of_more_ranges_than_can_be_followed(shared: Lab) -> None:
    pair = Pair(shared, "loop-512")
    merged_discards(pair.device, [(MIB + n * 8 * KIB, 8 * KIB) for n in range(300)])
    pair.is_resynced_once("more ranges than can be followed")


def test_a_write_beyond_the_end(shared: Lab) -> None:
    """A disk that grew and shrank back between two commands: it may have been another's place."""
    pair = Pair(shared, "loop-512")
    resize(pair.device, pair.file, SIZE + MIB)
    pair.write(SIZE + 64 * KIB)
    resize(pair.device, pair.file, SIZE)
    assert pair.doubts() == 1
    pair.is_resynced_once("beyond the end it had when tracking began")


def test_a_write_beyond_an_end_that_moved(shared: Lab) -> None:
    """Growth is seen by the next command, and what was written there is no loss."""
    pair = Pair(shared, "loop-512")
    resize(pair.device, pair.file, SIZE + MIB)
    pair.write(SIZE + 64 * KIB)
    done = shared.sync(pair.device, pair.replica)
    assert (done.mode, done.bytes_changed) == ("incremental", MIB)
    pair.is_identical()
    pair.goes_on()


@contextmanager
def skipped(monkeypatch: pytest.MonkeyPatch, runs: dict[str, int]) -> Iterator[None]:
    """The kernel's count of skipped runs, by program, is so much higher."""
    programs = Kernel.programs

    def counted(self: Kernel, kind: int) -> dict[str, Program]:
        return {
            name: replace(program, missed=program.missed + runs.get(name, 0))
            for name, program in programs(self, kind).items()
        }

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "programs", counted)
        yield


SUBMIT, COMPLETE = zip(*BY_KIND.values(), strict=True)
BOTH = "skipped 7 runs of both tracking programs"
BEGINS = "skipped 3 runs of the program that sees writes begin"


@pytest.mark.parametrize(
    ("kind", "names", "reason"),
    [
        ("loop-512", SUBMIT, ""),
        ("loop-512", COMPLETE, ""),
        ("loop-512", SUBMIT + COMPLETE, BOTH),
        pytest.param("zram", SUBMIT, BEGINS, marks=pytest.mark.needs("zram")),
        pytest.param("zram", COMPLETE, "", marks=pytest.mark.needs("zram")),
    ],
)
def test_skipped_runs(
    shared: Lab,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    names: tuple[str, ...],
    reason: str,
) -> None:
    """Of the one program they are covered where the other's marks can stand in for them."""
    pair = Pair(shared, kind)
    pair.write(MIB)
    with skipped(monkeypatch, {name: 3 if name in SUBMIT else 4 for name in names}):
        done = shared.sync(pair.device, pair.replica)
        assert done.mode == ("resync" if reason else "incremental"), done.reason
        assert reason in done.reason
        pair.is_identical()
        pair.goes_on(doubts=bool(reason))
