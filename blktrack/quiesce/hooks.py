"""Commands of the user that prepare what writes to a device for a point, and release it."""

from __future__ import annotations

import os
import signal
import subprocess

_TAIL = 4096  # bytes of what a command says that are looked at


def run(command: str, phase: str, device: str, limit: float) -> str:
    """Run a shell command; "" or what went wrong, as a clause.

    It finds BLKTRACK_PHASE (`pre` or `post`) and BLKTRACK_DEVICE in its environment. After `limit`
    seconds it is killed, with what it started.
    """
    # Neither a pipe, which a child left behind would hold open, nor a file.
    said = os.memfd_create("hook")
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, "BLKTRACK_PHASE": phase, "BLKTRACK_DEVICE": device},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"it took longer than {limit:g} s"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return ""
        words = _last_line(said)
    finally:
        os.close(said)
    how = f"signal {-code} killed it" if code < 0 else f"it ended with code {code}"
    return f"{how}: {words}" if words else how


def _last_line(fd: int) -> str:
    size = os.fstat(fd).st_size
    data = os.pread(fd, _TAIL, max(0, size - _TAIL))
    lines = data.decode(errors="replace").strip().splitlines()
    return "".join(c for c in lines[-1] if c.isprintable()) if lines else ""
