"""A device-mapper volume whose table is changed while it is in use."""

from __future__ import annotations

from pathlib import Path

from blktrack.sysfs import BlockDevice
from blktrack.units import SECTOR
from tests.blockdev import Lab, run, wait_until
from tests.vm.guest.stacks.mapper import dm

LONG = 120_000  # milliseconds: longer than any test; what is held so long is released


class Volume:
    """All of a lower device. Suspended or not, it goes with its lab."""

    def __init__(self, lab: Lab, lower: str, size: int, target: str = "linear") -> None:
        self.lower, self.size = lower, size
        self.path = dm(lab, target, size, delays(lower, 0) if target == "delay" else f"{lower} 0")
        self.name = Path(self.path).name
        self.device = BlockDevice.find(self.path)
        lab.stack.callback(self.resume)  # or what waits there would do so for ever

    @property
    def held(self) -> int:
        """Writes that dm-delay holds, which the kernel does not count as in flight."""
        return int(run("dmsetup", "status", self.name).split()[4])

    def load(self, target: str, arguments: str) -> None:
        """The table that the next `resume` brings into force."""
        table = f"0 {self.size // SECTOR} {target} {arguments}"
        run("dmsetup", "load", self.name, "--table", table)

    def suspend(self, *options: str) -> None:
        run("dmsetup", "suspend", *options, self.name)

    def resume(self) -> None:
        run("dmsetup", "resume", self.name)

    def hold(self, milliseconds: int = LONG) -> None:
        """Have each write from now on take so long, at least."""
        self.load("delay", delays(self.lower, milliseconds))
        self.resume()

    def release(self) -> None:
        """Let go of all that is held: dm-delay does before it is suspended (delay_presuspend)."""
        self.suspend()
        self.resume()

    def holds(self, count: int) -> None:
        """Wait until it holds so many writes."""
        wait_until(lambda: self.held == count, f"{count} writes held by {self.name}")


def delays(lower: str, writes: int) -> str:
    """Arguments of dm-delay: of reads, of writes and of flushes, in milliseconds."""
    return f"{lower} 0 0 {lower} 0 {writes} {lower} 0 0"
