"""Whether an increment fits beside its replica, found out before the file system there is full.

Others may need that file system, /var above all, so what cannot fit is not begun. How much is
needed is not known from the extents: what reads as zero takes no room. Where they are more than
what is free they are therefore read once to be counted, up to the byte that does not fit any more.
What is counted is what direct I/O would write; nothing that could fit is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from blktrack.errors import CopyFailed
from blktrack.extent import ExtentArray, total
from blktrack.observer import NOBODY, Observer
from blktrack.rates import UNLIMITED, Rates
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import EndError, Endpoint, open_end
from blktrack.units import format_size

FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(CopyFailed):
    """An increment does not fit beside its replica, which is as it was."""

    def __init__(self, folder: Path | str, changed: int, free: int, why: str) -> None:
        super().__init__(
            f"no room in {folder} for an increment of {format_size(changed)}: {why}",
            hint=f"free space there ({format_size(free)} of it is free), or run blktrack sync"
            " --in-place: it needs none, but the replica is at no point until it ends",
        )

    @classmethod
    def after(cls, folder: Path, staged: int, error: EndError) -> Self:
        """Of one that was begun: so much of it was staged, and is dropped."""
        return cls(folder, staged, free_in(folder) or 0, os.strerror(error.errno))


class Cramped(Exception):
    """It did not next to what was kept of it, which is dropped: the whole may fit by itself."""


@contextlib.contextmanager
def room(
    folder: Path,
    source: str,
    extents: ExtentArray,
    *,
    stop: threading.Event,
    limit: Rates = UNLIMITED,
    observer: Observer = NOBODY,
) -> Iterator[None]:
    """Around the staging of `extents` in `folder`: NoRoom if it cannot come to an end there."""
    free = free_in(folder)
    check_room_for(extents, folder, free, source, stop=stop, limit=limit, observer=observer)
    try:
        yield
    except EndError as error:
        if error.errno in FULL and Path(error.path).parent == folder:
            raise NoRoom(folder, total(extents), free or 0, os.strerror(error.errno)) from error
        raise


def check_room_for(
    extents: ExtentArray,
    folder: Path | str,
    free: int | None,
    source: str,
    *,
    stop: threading.Event,
    limit: Rates = UNLIMITED,
    observer: Observer = NOBODY,
) -> None:
    """NoRoom if `extents` of a source do not fit into so many bytes."""
    changed = total(extents)
    if free is None or changed <= free:
        return
    observer.phase("looking whether it fits beside the replica", changed)
    with open_end(source) as end:
        counter = _Counter(end.size, free)
        try:
            copy(
                end,
                counter,
                extents,
                known_zero=True,
                stop=stop,
                limit=limit,
                progress=observer.done,
            )
        except EndError as error:
            if error.path != counter.path:
                raise
            why = f"more than {format_size(free)} of it is data"
            raise NoRoom(folder, changed, free, why) from error


def free_in(folder: Path) -> int | None:
    """Bytes that this user can still write there; None where that is not told."""
    while not folder.exists():
        folder = folder.parent
    info = os.statvfs(folder)
    blocks = info.f_bavail if os.geteuid() else info.f_bfree
    return blocks * info.f_frsize if info.f_blocks else None


class _Counter(Endpoint):
    """Takes so many bytes and keeps none."""

    def __init__(self, size: int, room: int) -> None:
        super().__init__("the count", size, 1)
        self._left = room
        self._lock = threading.Lock()

    def _write(self, view: memoryview, offset: int) -> None:
        with self._lock:
            self._left -= len(view)
            if self._left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _read(self, view: memoryview, offset: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def _sync(self) -> None: ...

    def close(self) -> None: ...
