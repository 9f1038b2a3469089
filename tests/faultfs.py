"""A file whose reads and writes fail where a test says: the medium errors of a disk, for real.

A FUSE file system with one file, `disk`, over a backing file, spoken to the kernel directly. It is
served by a process of its own, so that a test that blocks in it cannot block it. A loop device over
the file then fails like a disk does:

    with FaultFile(folder, size) as fault:
        fault.fail(reads=[(8192, 4096)], writes=[(0, 512)])

With a `device` it is mounted as a file system on that (fuseblk), as ntfs-3g is: one that cannot be
frozen. It keeps nothing there.

The ranges of (start, length) hold from the return of fail() on; nothing else ever fails. After
hold() the next write waits until release(), and with it whoever waits for it, or for any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

# linux/fuse.h
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, RELEASEDIR, DESTROY = 18, 20, 25, 26, 27, 29, 38
BATCH_FORGET, FALLOCATE = 42, 43
FOPEN_DIRECT_IO = 1
FUSE_BIG_WRITES, FUSE_MAX_PAGES = 1 << 5, 1 << 22
IN_HEADER = struct.Struct("IIQQIIII")
OUT_HEADER = struct.Struct("IiQ")
ATTR = struct.Struct("QQQQQQIIIIIIIIII")
ROOT_NODE, FILE_NODE = 1, 2
MAX_WRITE = 1 << 20
MNT_DETACH = 2

Ranges = list[tuple[int, int]]

_libc = ctypes.CDLL(None, use_errno=True)


class FaultFile:
    """The test's side: mounts in `folder`, serves until the end of the context."""

    def __init__(self, folder: Path, size: int, device: str = "") -> None:
        self._device = device
        self.mount = folder / "fault"
        self.backing = folder / "fault.backing"
        self.path = self.mount / "disk"
        with self.backing.open("xb") as made:
            made.truncate(size)
        self.mount.mkdir()

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.mount), str(self.backing), self._device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()
        return self

    def fail(self, *, reads: Ranges | None = None, writes: Ranges | None = None) -> None:
        """Let these ranges fail with EIO from now on, and no others."""
        self._tell({"reads": reads or [], "writes": writes or []})
        self._answer()

    def hold(self) -> None:
        """Let the next write wait."""
        self._tell("hold")
        self._answer()

    def until_held(self) -> None:
        """Wait until a write does."""
        assert self._server.stdout
        ready, _, _ = select.select([self._server.stdout], [], [], 60)
        assert ready, "nothing was written"
        assert self._server.stdout.readline() == "held\n"

    def release(self) -> None:
        self._tell("release")
        self._answer()

    def _tell(self, words: object) -> None:
        assert self._server.stdin
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()

    def _answer(self) -> None:
        assert self._server.stdout
        assert self._server.stdout.readline() == "ok\n", "the server of the fault file died"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _libc.umount2(os.fsencode(self.mount), MNT_DETACH)
        self._server.kill()
        self._server.communicate()


class Server:
    def __init__(self, mount: str, backing: str, device: str) -> None:
        self._file = os.open(backing, os.O_RDWR)
        self._faults: dict[str, Ranges] = {"reads": [], "writes": []}
        self._holds = self._ended = False
        self._fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
        source, kind = (device, b"fuseblk") if device else ("faultfs", b"fuse.faultfs")
        if _libc.mount(os.fsencode(source), os.fsencode(mount), kind, 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        self._handlers: dict[int, Callable[[int, memoryview], bytes]] = {
            INIT: self._init,
            LOOKUP: self._lookup,
            GETATTR: self._getattr,
            SETATTR: self._getattr,
            OPEN: self._open,
            OPENDIR: self._open,
            READ: self._read,
            WRITE: self._write,
            STATFS: lambda node, body: struct.pack(
                "QQQQQIIIIIIIIII", *[0] * 5, 4096, 255, *[0] * 8
            ),
            **dict.fromkeys((RELEASE, RELEASEDIR, FSYNC, FLUSH), lambda node, body: b""),
        }

    def serve(self) -> None:
        request = memoryview(bytearray(MAX_WRITE + (1 << 16)))
        while True:
            ready, _, _ = select.select([self._fuse, sys.stdin], [], [])
            if sys.stdin in ready:
                self._obey()
                if self._ended:
                    return
            if self._fuse in ready:
                try:
                    count = os.readv(self._fuse, [request])
                except OSError as error:
                    if error.errno == errno.ENODEV:  # unmounted
                        return
                    continue
                self._handle(request[:count])

    def _obey(self) -> None:
        line = sys.stdin.readline()
        self._ended = not line
        match json.loads(line or '"release"'):
            case str(word):
                self._holds = word == "hold"
            case faults:
                self._faults = faults
        print("ok", flush=True)

    def _handle(self, request: memoryview) -> None:
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        if opcode in (FORGET, BATCH_FORGET):
            return
        body, code = b"", 0
        try:
            handler = self._handlers.get(opcode)
            if handler is None:
                raise OSError(errno.ENOSYS, "")
            body = handler(node, request[IN_HEADER.size :])
        except OSError as error:
            code = -(error.errno or errno.EIO)
        header = OUT_HEADER.pack(OUT_HEADER.size + len(body), code, unique)
        with contextlib.suppress(FileNotFoundError):  # the request was interrupted meanwhile
            os.writev(self._fuse, [header, body])

    def _init(self, node: int, body: memoryview) -> bytes:
        _, _, readahead, flags = struct.unpack_from("IIII", body)
        wanted = flags & (FUSE_BIG_WRITES | FUSE_MAX_PAGES)
        pages = MAX_WRITE // 4096
        return struct.pack(
            "IIIIHHIIHHII6I",
            7,
            31,
            readahead,
            wanted,
            12,
            9,
            MAX_WRITE,
            1,
            pages,
            0,
            0,
            0,
            *[0] * 6,
        )

    def _attributes(self, node: int) -> bytes:
        info = os.fstat(self._file)
        mode, size = (
            (stat.S_IFDIR | 0o755, 0) if node == ROOT_NODE else (stat.S_IFREG | 0o600, info.st_size)
        )
        seconds = [0, 0, 0]
        return ATTR.pack(node, size, -(-size // 512), *seconds, *seconds, mode, 1, 0, 0, 0, 4096, 0)

    def _lookup(self, node: int, body: memoryview) -> bytes:
        if bytes(body).rstrip(b"\0") != b"disk":
            raise OSError(errno.ENOENT, "")
        return struct.pack("QQQQII", FILE_NODE, 0, 1, 1, 0, 0) + self._attributes(FILE_NODE)

    def _getattr(self, node: int, body: memoryview) -> bytes:
        return struct.pack("QII", 1, 0, 0) + self._attributes(node)

    def _open(self, node: int, body: memoryview) -> bytes:
        return struct.pack("QII", 0, FOPEN_DIRECT_IO if node == FILE_NODE else 0, 0)

    def _read(self, node: int, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("QQI", body)
        self._check("reads", offset, size)
        return os.pread(self._file, size, offset)

    def _write(self, node: int, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("QQI", body)
        if self._holds:
            print("held", flush=True)
        while self._holds:
            self._obey()
        self._check("writes", offset, size)
        return struct.pack("II", os.pwrite(self._file, body[40 : 40 + size], offset), 0)

    def _check(self, kind: str, offset: int, size: int) -> None:
        for start, length in self._faults[kind]:
            if offset < start + length and start < offset + size:
                raise OSError(errno.EIO, "")


if __name__ == "__main__":
    server = Server(*sys.argv[1:])
    print("ok", flush=True)
    server.serve()
