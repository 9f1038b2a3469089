"""A folder where another host may have replicas, what lies around it, and deltas to send there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from blktrack.cli.forced import VARIABLE
from blktrack.point import Point
from blktrack.ship.delta import DeltaWriter
from tests.blockdev import TOP, Done
from tests.delta_examples import BASE, HEADER, POINT

SIZE = 1 << 20
FILL = b"\x5a" * 4096


# Places of extents and their lengths, of data 4 KiB at most.
Frames = Iterable[tuple[int, int]]


def full(size: int = SIZE) -> bytes:
    """A full copy that leads to BASE: FILL and zeroes."""
    return _delta(size, None, BASE, [(0, len(FILL))], [(len(FILL), size - len(FILL))])


def increment(*, data: Frames = (), zero: Frames = ()) -> bytes:
    """From BASE to POINT."""
    return _delta(SIZE, BASE, POINT, data, zero)


def _delta(size: int, base: Point | None, point: Point, data: Frames, zero: Frames) -> bytes:
    file = io.BytesIO()
    writer = DeltaWriter(file, replace(HEADER, source=replace(HEADER.source, size=size), base=base))
    for start, length in data:
        writer.data(start, FILL[:length])
    for start, length in zero:
        writer.zero(start, length)
    writer.end(point)
    return file.getvalue()


class Grounds:
    """`folder` for replicas, and what nobody may get at: `outside` with a file, an empty folder."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.folder = top / "srv/replicas"
        self.outside = top / "outside"
        (self.folder / "sub").mkdir(parents=True)
        (self.outside / "empty").mkdir(parents=True)
        (self.outside / "file").write_bytes(b"not yours")

    def seen(self) -> dict[str, object]:
        """All there is, to be compared: kinds, links, sizes, times, contents."""
        found: dict[str, object] = {}
        for path in sorted(self.top.rglob("*")):
            info = path.lstat()
            kind = (info.st_mode, info.st_ino, info.st_nlink, info.st_size, info.st_mtime_ns)
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path)] = (kind, os.readlink(path) if path.is_symlink() else content)
        return found

    def asked(self, command: str | None, delta: bytes = b"", *options: str) -> Done:
        """`recv --restrict` as sshd runs it for a client that asks for a command."""
        environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
        if command is not None:
            environment[VARIABLE] = command
        done = subprocess.run(
            [sys.executable, "-m", "blktrack", "recv", "--restrict", self.folder, *options],
            input=delta,
            capture_output=True,
            check=False,
            cwd=TOP,
            timeout=120,
            env=environment | {"BLKTRACK_ROOT": str(self.top.parent / "root")},
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())
