"""What a probe has on the host while it runs, so that nothing of it stays, however it ends.

    /sys/fs/bpf/blktrack-probe-TAG/        locked (flock) by the probe that made it
    /sys/fs/bpf/blktrack-probe-TAG/KIND    a symbolic link whose target tells what was made
    /sys/fs/bpf/blktrack-probing-TAG/      the pins of its programs and maps

A note is written before what it names is made, except for zram, whose number is known only then: a
death in between leaves a device of size 0. What the notes of a dead probe name is taken away by the
next one. bpffs is the place for it, as everybody who could meet a probe's things sees it: a lock in
/run would be another one in each container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from blktrack.bpf.install import mount_bpffs
from blktrack.bpf.kernel import remove as remove_pins
from blktrack.config import BPFFS
from blktrack.observer import Observer
from blktrack.sysfs import SYSFS

_ROOM, _PINS = "blktrack-probe-", "blktrack-probing-"
ZRAM = SYSFS / "class/zram-control"
PATIENCE = 5.0  # seconds in which a late look of udev at a device is over


class Room:
    """As a context: locked at the beginning, empty and gone at the end. BlktrackError, OSError."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._fd = -1

    def __enter__(self) -> Self:
        mount_bpffs(BPFFS)
        sweep()
        while self._fd < 0:
            self.tag = secrets.token_hex(4)
            self.folder, self.pins = BPFFS / f"{_ROOM}{self.tag}", BPFFS / f"{_PINS}{self.tag}"
            self.folder.mkdir(mode=0o700)
            self._fd = _locked(self.folder, fcntl.LOCK_EX)
        return self

    def note(self, kind: str, value: str) -> None:
        (self.folder / kind).symlink_to(value)

    def undo(self, kind: str) -> None:
        """Take away what a note names; it is told of if that does not work, and stays noted."""
        try:
            _undo(self.folder, kind)
        except OSError as error:
            what = f"{kind} {os.readlink(self.folder / kind)}"
            self._observer.warn(
                f"a scratch device could not be removed ({what}: {error.strerror}); the next probe "
                "tries again"
            )

    def __exit__(self, *_: object) -> None:
        for kind in notes(self.folder):
            self.undo(kind)
        remove_pins(self.pins)
        with contextlib.suppress(OSError):  # with a note in it, it is for the next probe
            self.folder.rmdir()
        os.close(self._fd)


def notes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sweep() -> None:
    """Take away what probes have left that were killed."""
    for folder in BPFFS.glob(f"{_ROOM}*"):
        with contextlib.suppress(OSError):  # in use, or gone by now, or the next one's turn
            fd = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fd < 0:
                continue
            try:
                for kind in notes(folder):
                    _undo(folder, kind)
                remove_pins(BPFFS / folder.name.replace(_ROOM, _PINS, 1))
                folder.rmdir()
            finally:
                os.close(fd)


def _locked(folder: Path, how: int) -> int:
    """A descriptor that holds the folder's lock; -1 if another took the folder away before."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
        if os.fstat(fd).st_ino == os.stat(folder).st_ino:
            return fd
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def _undo(folder: Path, kind: str) -> None:
    """OSError if it is still there after PATIENCE."""
    note = folder / kind
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            _REMOVE[kind](os.readlink(note))
            break
        except FileNotFoundError:
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)
    note.unlink(missing_ok=True)


def _remove_zram(value: str) -> None:
    """`value` is number and sequence: another device may have the number by now."""
    number, diskseq = value.split()
    folder = SYSFS / f"block/zram{number}"
    if (folder / "diskseq").read_text().strip() == diskseq:
        (folder / "reset").write_text("1")
        (ZRAM / "hot_remove").write_text(number)


def _remove_dm(name: str) -> None:
    dmsetup("remove", "--noudevsync", name)


def _remove_null_blk(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        (Path(path) / "power").write_text("0")
    os.rmdir(path)


_REMOVE: dict[str, Callable[[str], None]] = {
    "zram": _remove_zram,
    "dm": _remove_dm,
    "null_blk": _remove_null_blk,
    "cgroup": os.rmdir,
}


def dmsetup(*words: str) -> None:
    """FileNotFoundError without the tool, or without a volume to remove; OSError if it fails."""
    tool = shutil.which("dmsetup", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool is None:
        raise FileNotFoundError(errno.ENOENT, "dmsetup is not installed")
    done = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        missing = "No such device" in said or "does not exist" in said
        raise (FileNotFoundError if missing else OSError)(errno.EBUSY, said or "dmsetup failed")
