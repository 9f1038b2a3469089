"""The scheme of bdsync, for hosts that have no bdsync: a digest of every block crosses the link.

    digests.py serve PATH                   on the far host
    digests.py sync SOURCE PATH SSH...      on the near one

The far side sends the MD5 of each block of 4 KiB; the near one answers by the blocks that differ.
Both read once, from the beginning to the end, at the same time. Needs nothing but Python.
"""

import hashlib
import os
import shlex
import struct
import subprocess
import sys
import threading
from typing import IO

BLOCK, BLOCKS = 4096, 256  # bytes; blocks that are read at once
_DIGEST = 16
_HEAD = struct.Struct("<QI")


def digests(data: bytes) -> bytes:
    view = memoryview(data)
    starts = range(0, len(view), BLOCK)
    return b"".join(hashlib.md5(view[at : at + BLOCK]).digest() for at in starts)


def serve(path: str, source: IO[bytes], sink: IO[bytes]) -> None:
    with open(path, "r+b", buffering=0) as file:
        writer = threading.Thread(target=_write, args=(file.fileno(), source))
        writer.start()
        for at in range(0, os.fstat(file.fileno()).st_size, BLOCK * BLOCKS):
            sink.write(digests(os.pread(file.fileno(), BLOCK * BLOCKS, at)))
        sink.close()
        writer.join()
        os.fsync(file.fileno())


def _write(fd: int, source: IO[bytes]) -> None:
    while head := source.read(_HEAD.size):
        at, length = _HEAD.unpack(head)
        os.pwrite(fd, source.read(length), at)


def sync(path: str, source: IO[bytes], sink: IO[bytes]) -> None:
    with open(path, "rb", buffering=0) as file:
        at = 0
        while data := file.read(BLOCK * BLOCKS):
            ours = digests(data)
            theirs = source.read(len(ours))
            if ours != theirs:
                _send(data, at, ours, theirs, sink)
            at += len(data)
    sink.close()
    source.read()


def _send(data: bytes, at: int, ours: bytes, theirs: bytes, sink: IO[bytes]) -> None:
    for number in range(len(ours) // _DIGEST):
        here = slice(number * _DIGEST, (number + 1) * _DIGEST)
        if ours[here] != theirs[here]:
            block = data[number * BLOCK : (number + 1) * BLOCK]
            sink.write(_HEAD.pack(at + number * BLOCK, len(block)) + block)


def main(words: list[str]) -> int:
    if words[0] == "serve":
        serve(words[1], sys.stdin.buffer, sys.stdout.buffer)
        return 0
    far = shlex.join([sys.executable, "-S", __file__, "serve", words[2]])
    with subprocess.Popen(
        [*words[3:], far], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        sync(words[1], process.stdout, process.stdin)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
