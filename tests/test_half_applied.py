"""A signal while an increment comes into its replica: a clean end, and the rest comes later."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack.ship.place import folder_of
from blktrack.ship.record import Record, State
from blktrack.ship.stage import is_left
from blktrack.ship.target import Target
from blktrack.units import MIB
from tests import sectors
from tests.background import Running, assert_clear
from tests.blockdev import Lab, read_image, wait_until, write_direct
from tests.faultfs import FaultFile
from tests.oracle import fill

pytestmark = pytest.mark.needs("root", "loop", "bpf", "fuse")

SIZE, CHANGED = 96 * MIB, 64 * MIB


class Slow:
    """A replica on a disk whose writes can be held up, and an increment that is to come into it."""

    def __init__(self, lab: Lab, fault: FaultFile) -> None:
        self.lab, self.fault = lab, fault
        self.source, self.replica = lab.loop(SIZE), lab.loop(SIZE, file=fault.path)
        fill(self.source)
        lab.track(self.source)
        lab.sync(self.source, self.replica)
        write_direct(self.source, MIB, sectors.make(MIB, CHANGED, 1))
        self.folder = folder_of(Target.find(self.replica), lab.store.paths)

    def struck(self, number: signal.Signals) -> None:
        """A sync gets a signal when it has begun to write to the replica."""
        self.fault.hold()
        try:
            running = Running(self.lab, "sync", self.source, self.replica)
            self.fault.until_held()
            running.process.send_signal(number)
            wait_until(lambda: not pending(running.process.pid), "the signal to be taken")
        finally:
            self.fault.release()
        done = running.end()
        says = (f"brought into {self.replica}", "the next sync finishes that first")
        assert_clear(done, 128 + number, *says)

    def assert_half_way(self) -> None:
        record = Record.read(self.folder / "replica.json")
        assert record is not None
        assert record.state is State.APPLYING and record.next is not None
        assert is_left(self.folder)
        (link,) = self.lab.status(self.source)["links"]
        assert (link["state"], link["point"]) == ("unfinished", None)
        assert "the next sync goes on with that" in link["reason"]


def pending(pid: int) -> bool:
    """Whether a signal to the process has not been delivered yet."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return any(int(line.split()[1], 16) for line in lines if line.startswith(("ShdPnd", "SigPnd")))


@pytest.fixture
def slow(shared: Lab) -> Iterator[Slow]:
    with FaultFile(shared.folder, SIZE) as fault, shared.fresh() as inner:
        yield Slow(inner, fault)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_half_way_and_the_next_one_goes_on(slow: Slow, number: signal.Signals) -> None:
    slow.struck(number)
    slow.assert_half_way()
    left = len(sectors.faults(read_image(slow.source), read_image(slow.replica)))
    assert left, "some was not in"
    # Again, when the next one finishes it.
    slow.struck(number)
    slow.assert_half_way()
    write_direct(slow.source, 80 * MIB, sectors.make(80 * MIB, MIB, 2))
    done = slow.lab.blktrack("sync", slow.source, slow.replica, "--no-resync", "--json")
    assert done.json["mode"] == "incremental"
    assert not sectors.faults(read_image(slow.source), read_image(slow.replica))
    assert not is_left(slow.folder)
    assert os.listdir(slow.folder) == ["replica.json"]
    (link,) = slow.lab.status(slow.source)["links"]
    assert (link["state"], link["pending_bytes"]) == ("ready", 0)
