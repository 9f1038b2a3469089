"""Reading and writing a pipe or file to the last byte, blocking or not."""

from __future__ import annotations

import select
from typing import Protocol

from blktrack.ship.delta.errors import DeltaBroken

_PATIENCE = 1000  # milliseconds after which a file in non-blocking mode is tried again anyway


class Source(Protocol):
    """A binary file to read from; fileno() is asked for in non-blocking mode only."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def fileno(self) -> int: ...


class Sink(Protocol):
    """A binary file to write to; fileno() is asked for in non-blocking mode only."""

    def write(self, data: memoryview, /) -> int | None: ...
    def flush(self) -> None: ...
    def fileno(self) -> int: ...


def read_full(file: Source, view: memoryview) -> int:
    """Fill `view`; the bytes read, fewer only at the end of the file. DeltaBroken if it fails."""
    done = 0
    try:
        while done < len(view):
            count = file.readinto(view[done:] if done else view)
            if count is None:
                _wait(file, select.POLLIN)
            elif count == 0:
                break
            else:
                done += count
    except OSError as error:
        raise DeltaBroken("read", error) from error
    return done


def write_all(file: Sink, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`, and have the file pass it on. DeltaBroken if it fails."""
    try:
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                with view[done:] as rest:
                    count = file.write(rest)
                if count is None:
                    _wait(file, select.POLLOUT)
                else:
                    done += count
        file.flush()
    except OSError as error:
        raise DeltaBroken("write", error) from error


def _wait(file: Source | Sink, event: int) -> None:
    poll = select.poll()
    poll.register(file.fileno(), event)
    poll.poll(_PATIENCE)
