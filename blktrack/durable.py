"""Files that are whole after a crash, and locks that a death releases."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from blktrack import crash
from blktrack.errors import BlktrackError, Busy
from blktrack.observer import NOBODY, Observer

_MOVE = "move {path} away; the next sync starts over from what is left"


def plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, as they are: asdict copies all that is in them. TypeError."""
    return {each.name: getattr(value, each.name) for each in fields(value)}


_encoded = json.JSONEncoder(default=plain).encode


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path`: after a crash at any step it holds the old value or the new one, whole.

    A line for each key: with `indent` Python's own encoder would do the work, not the one in C.
    """
    lines = (f" {_encoded(key)}: {_encoded(each)}" for key, each in value.items())
    write_bytes(path, "{{\n{}\n}}\n".format(",\n".join(lines)).encode())


def write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """As write_json, for any content. Writers of one path hold one lock.

    mode -- permissions, whatever the umask.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        make_directory(path.parent)
        with open(temporary, "wb", opener=_without_following) as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        crash.point("file-written")
        os.rename(temporary, path)
        crash.point("file-renamed")
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BlktrackError(
            f"cannot write {path}: {error.strerror}",
            hint="free space on that file system or make it writable, then run the command again",
        ) from error


def _without_following(path: str, flags: int) -> int:
    """What is left of a death is written over; never what a link in its place leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read_json(path: Path) -> dict[str, Any] | None:
    """The value of `path`, None if there is none. Unreadable content is an error, never a guess."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BlktrackError(
            f"cannot read {path}: {error.strerror}",
            hint="see that it can be read: by whom it may be, and the kernel log for its disk",
        ) from error
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise BlktrackError(
            f"{path} is damaged: {error}",
            hint=_MOVE.format(path=path),
        ) from error
    if not isinstance(value, dict):
        raise BlktrackError(
            f"{path} is damaged: it holds no JSON object", hint=_MOVE.format(path=path)
        )
    return value


def make_directory(path: Path) -> None:
    """`mkdir -p`, with every new name durable."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make names created, replaced or removed in this directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock(
    path: Path, *, what: str, wait: float = 0.0, observer: Observer = NOBODY
) -> Iterator[None]:
    """Hold `path` exclusively; a killed holder releases it. Busy after `wait` seconds.

    `what` names the thing held, for the message: "device /dev/sdb".
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BlktrackError(
            f"cannot lock {path}: {error.strerror}",
            hint="make it writable, or run the command as root",
        ) from error
    try:
        deadline, told = time.monotonic() + wait, False
        while not _try_lock(fd):
            if time.monotonic() >= deadline:
                raise Busy(f"{what} is held by another run", hint="wait for it to end")
            if not told:
                observer.phase(f"waiting for {what}, which another run holds", 0)
                told = True
            time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Whether somebody holds this lock, as the kernel lists it: to try it could be in the way of
    who does not wait for it."""
    try:
        status = path.stat()
        table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    held = {fields[5] for line in table.splitlines() if (fields := line.split())[1] == "FLOCK"}
    return f"{device}:{status.st_ino}" in held


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True
