"""Taking a target: opened so that nothing else can have it, or refused with who has it."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from blktrack.durable import lock, sync_directory
from blktrack.errors import Refused
from blktrack.ship.endpoint import DeviceEnd, EndError, Endpoint, FileEnd
from blktrack.ship.target import Target, in_use


def take(
    target: Target, lock_file: Path, held: contextlib.ExitStack, *, size: int, writable: bool
) -> tuple[Endpoint, bool]:
    """The target for this run alone until `held` is left, and whether its file was made for it.

    lock_file -- held besides a device, whose claim does not keep readers apart.
    size -- of the source, to which a new file is made; one that is only read is as large.
    """
    if target.device is not None:
        held.enter_context(lock(lock_file, what=f"replica {target.name}"))
        end: Endpoint = open_device(target, writable=writable)
        created = False
    else:
        end, created = open_file(target, size, writable=writable)
    held.callback(end.close)
    return end, created


def open_device(target: Target, *, writable: bool) -> DeviceEnd:
    assert target.device is not None
    try:
        end = DeviceEnd(target.path, writable=writable)
    except EndError as error:
        raise _refusal(target, error) from error
    number = os.fstat(end.fileno()).st_rdev
    if (os.major(number), os.minor(number)) != target.device.number:
        end.close()
        raise Refused(f"{target.name} became another device", hint="run the command again")
    return end


def open_file(target: Target, size: int, *, writable: bool) -> tuple[FileEnd, bool]:
    """The file, created sparse if it is absent, and whether it was."""
    created = False
    try:
        if not target.exists:
            if not writable:
                raise Refused(f"{target.name} does not exist", hint="sync to it first")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(target.path, flags, 0o600))
            created = True
            sync_directory(Path(target.path).parent)
        end = FileEnd(target.path, writable=writable)
    except OSError as error:
        raise _refusal(target, EndError(target.path, "create", None, error)) from error
    except EndError as error:
        raise _refusal(target, error) from error
    if created:
        try:
            end.resize(size)
        except EndError as error:
            end.close()
            os.unlink(target.path)
            raise Refused(str(error), hint=error.hint) from error
    if not writable and end.size < size:
        end.close()
        raise Refused(f"{target.name} is smaller than its source", hint="sync to it first")
    return end, created


def _refusal(target: Target, error: EndError) -> Refused:
    """Why the kernel would not let us have it."""
    if error.errno == errno.EBUSY:
        why = in_use(target.device) if target.device is not None else ""
        return Refused(
            f"{target.name} {why or 'is in use: another program has it exclusively'}",
            hint="release it (umount, vgchange -an, mdadm --stop, …), or choose another replica",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Refused(f"{target.name} is read-only: {os.strerror(error.errno)}", hint=error.hint)
    return Refused(str(error), hint=error.hint)
