"""Devices that are lost while they are used: taken away, replaced, shrunk, write-protected.

The kernel tells of most of it by uevents. A device's write protection may change without one, and a
container has none at all, so there also is a look at sysfs every second. A uevent says no more than
that it is time to look: what it told of may be over by then, or be followed by worse.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from blktrack.errors import BlktrackError, DeviceLost
from blktrack.sysfs import BlockDevice
from blktrack.units import format_size

_EVERY = 1.0  # seconds
_FAMILY = 15  # NETLINK_KOBJECT_UEVENT of linux/netlink.h
_KERNEL_GROUP = 1  # of that family: udev sends its own to another one


@dataclass(frozen=True)
class Watched:
    """A device in use, as it was to begin with."""

    role: str  # "source" or "replica"
    device: BlockDevice
    least: int  # bytes that it has to have; that it grows is its own affair
    writable: bool = False
    sequence: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequence", self.device.diskseq)

    def lost(self) -> tuple[str, str]:
        """What became of it and what to do, as clauses; "" if nothing did."""
        device, path = self.device, self.device.path
        again = "run the command again"
        if not device.present:
            return "was removed", f"connect it, then {again}"
        if device.diskseq != self.sequence:
            return "was replaced by another medium", f"check what {path} is by now, then {again}"
        if (size := device.size) < self.least:
            if size == 0:
                return "lost its medium", f"attach or configure it, then {again}"
            shrank = f"shrank from {format_size(self.least)} to {format_size(size)}"
            if self.role == "source":
                return shrank, f"{again}: it then compares all that is left with the replica"
            return shrank, f"enlarge it, or choose another replica, then {again}"
        if self.writable and (device.read_only or device.disk.read_only):
            return "became read-only", f"blockdev --setrw {path}, then {again}"
        return "", ""


class Watch:
    """Sets `stop` when a device is lost; leaving its context then raises DeviceLost instead of what
    came of that.
    """

    def __init__(
        self,
        stop: threading.Event,
        source: BlockDevice,
        replica: BlockDevice | None,
        *,
        writable: bool = False,
    ) -> None:
        self._stop = stop
        self._devices = [Watched("source", source, source.size)]
        if replica is not None:
            least = min(source.size, replica.size)
            self._devices.append(Watched("replica", replica, least, writable))
        self._lost: DeviceLost | None = None
        self._ended = threading.Event()
        # Each end of the pipe is closed by the side that has it: its end wakes the thread.
        self._asleep, self._awake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="uevents", daemon=True)

    def look(self) -> None:
        """Compare every device with what it was."""
        for watched in self._devices:
            what, hint = watched.lost()
            if what and self._lost is None:
                sentence = f"the {watched.role} {watched.device.path} {what} while it was in use"
                self._lost = DeviceLost(sentence, hint=f"{hint}; what was done is kept")
                self._stop.set()

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as held:
                source = _subscribe(held)
                # Also at once: what happened before the subscription was told to nobody.
                while not self._ended.is_set() and self._lost is None:
                    self.look()
                    self._wait(source)
        finally:
            os.close(self._asleep)

    def _wait(self, source: socket.socket | None) -> None:
        """Until an event, the end or a second has come. What events there are is taken in."""
        poll = select.poll()
        poll.register(self._asleep, select.POLLIN)
        if source is not None:
            poll.register(source, select.POLLIN)
        ready = dict(poll.poll(_EVERY * 1000))
        if source is not None and source.fileno() in ready:
            # In the end there are none left, or more came than were kept, which says as much.
            with contextlib.suppress(OSError):
                while True:
                    source.recv(1)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        os.close(self._awake)
        self._thread.join()
        if isinstance(value, (BlktrackError, OSError)):
            self.look()
            if self._lost is not None:
                raise self._lost from value


def _subscribe(held: contextlib.ExitStack) -> socket.socket | None:
    """The kernel's events; None where there are none to be had."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    try:
        source = held.enter_context(socket.socket(socket.AF_NETLINK, kind, _FAMILY))
        source.bind((0, _KERNEL_GROUP))
    except OSError:  # no netlink, no permission: every second is good enough
        return None
    return source
