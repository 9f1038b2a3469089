"""Tasks that take turns on one processor in the middle of their changes, and so in programs.

On kernels that preempt programs, most of what is here went by one or the other (layout.py).
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blktrack.bpf import layout
from blktrack.bpf.btf import Btf
from blktrack.report import SyncReport
from blktrack.units import KIB, MIB, SECTOR
from tests import sectors
from tests.blockdev import Lab, read_image, run, write_direct
from tests.oracle import fill, missed, repeating

pytestmark = [
    pytest.mark.needs("root", "bpf", "dmsetup"),
    pytest.mark.machine("inflight"),
    pytest.mark.usefixtures("mapper"),
    pytest.mark.timeout(300),
]

SIZE, BLOCK = 16 * MIB, 4 * KIB
TASKS, SECONDS = 4, 10.0
ENABLED = Path("/proc/sys/kernel/ftrace_enabled")
every_kind = pytest.mark.parametrize("kind", ["request", "bio"])


def device_of(lab: Lab, kind: str) -> str:
    """A disk that takes no time, so that its tasks need the processor alone."""
    loop = lab.loop(SIZE)
    if kind == "request":
        return loop
    name = f"busy{os.getpid()}-{lab.name('dm').name}"
    run("dmsetup", "create", name, "--table", f"0 {SIZE // SECTOR} linear {loop} 0")
    lab.stack.callback(run, "dmsetup", "remove", "--retry", name)
    return f"/dev/mapper/{name}"


def write(device: str, number: int) -> None:
    """All blocks of a task's own part, over and over, out of order."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    memory, part = mmap.mmap(-1, BLOCK), SIZE // TASKS
    order = random.Random(number)
    while True:
        at = number * part + order.randrange(part // BLOCK) * BLOCK
        memory[:8] = time.monotonic_ns().to_bytes(8, "little")
        os.pwrite(fd, memory, at)


@contextlib.contextmanager
def writing(device: str) -> Iterator[None]:
    tasks = [
        multiprocessing.Process(target=write, args=(device, number), daemon=True)
        for number in range(TASKS)
    ]
    for task in tasks:
        task.start()
    try:
        yield
    finally:
        for task in tasks:
            task.kill()
        for task in tasks:
            task.join()


@every_kind
def test_tasks_that_preempt_each_other(
    shared: Lab, kind: str, record_property: Callable[[str, object], None]
) -> None:
    device = device_of(shared, kind)
    fill(device)
    watch, replica = shared.track(device), str(shared.name("replica"))
    assert shared.sync(device, replica).mode == "initial"
    watch.look()
    before = read_image(device)
    reports: list[SyncReport] = []
    with writing(device):
        end = time.monotonic() + SECONDS
        with repeating(lambda: reports.append(shared.sync(device, replica))):
            time.sleep(max(end - time.monotonic(), 0))
    reports.append(shared.sync(device, replica))
    modes = {report.mode: report.reason for report in reports}
    assert modes.keys() <= {"incremental", "nothing"}, modes
    after, look = read_image(device), watch.look()
    assert not any(look.losses.values()), look.losses
    assert not len(missed(before, after, look.drained))
    assert not sectors.faults(after, read_image(replica))
    with watch.open() as tracking:
        begins, _ = tracking.program_pair()
        record_property(
            "measured",
            f"{tracking.counters()['writes']} writes, {len(reports)} syncs; the kernel did not run "
            f"for {begins.skipped} of the host's changes",
        )


@every_kind
def test_a_probe_that_is_off_is_a_doubt(shared: Lab, kind: str) -> None:
    """Copies see all the same, and are not thought to be enough."""
    btf = Btf()
    probes = layout.cast(btf)
    btf.close()
    device = device_of(shared, kind)
    fill(device)
    shared.track(device)
    replica = str(shared.name("replica"))
    assert shared.sync(device, replica).mode == "initial"
    enabled = ENABLED.read_text(encoding="ascii")
    try:
        ENABLED.write_text("0", encoding="ascii")
        for number in range(5):
            write_direct(device, number * MIB, os.urandom(BLOCK))
    finally:
        ENABLED.write_text(enabled, encoding="ascii")
    done = shared.sync(device, replica)
    assert done.mode == ("resync" if probes else "incremental"), done.reason
    assert not probes or "while the probe for it was off" in done.reason
    write_direct(device, 6 * MIB, os.urandom(BLOCK))
    assert shared.sync(device, replica).mode == "incremental"
    assert not sectors.faults(read_image(device), read_image(replica))
