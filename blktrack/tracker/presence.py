"""Whether a device is there and the one that tracking began on, asked every second of many."""

from __future__ import annotations

import os

from blktrack.state import DeviceState
from blktrack.sysfs import BlockDevice
from blktrack.tracker import doubt
from blktrack.tracker.tracker import present

_TOLD = 64  # bytes: sysfs says each of these numbers in less


class Presence:
    """Four numbers tell whether anything changed; only then is the rest looked at again."""

    def __init__(self) -> None:
        self.device: BlockDevice | None = None
        self.size = 0  # bytes, at the last look
        self._files: tuple[str, ...] = ()
        self._seen: tuple[object, ...] = ()
        self._reason: str | None = None

    def look(self, state: DeviceState) -> str | None:
        """Why it is not the device of its generation; `device` is None if it is not there."""
        seen = self._look(state)
        diskseq = self.device is not None and seen[-1] not in (b"", b"0\n")
        if seen != self._seen or not diskseq:
            self.device = found = present(state)
            if found is not None:
                parts = ("size", "start") if found.is_partition else ("size",)
                self._files = (*(f"{found.sys}/{p}" for p in parts), f"{found.disk.sys}/diskseq")
            self._seen = self._look(state)
            self.size = found.size if found else 0
            self._reason = doubt.of_identity(state, found) if found else None
        return self._reason

    def _look(self, state: DeviceState) -> tuple[object, ...]:
        try:
            number = os.stat(state.path).st_rdev
        except OSError:
            number = 0
        # What of the record is compared with the device: it is another one with each generation.
        record = (state.path, state.generation, state.size)
        return (record, number, *map(_told, self._files))


def _told(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, _TOLD)
    except OSError:
        return b""
    finally:
        os.close(fd)
