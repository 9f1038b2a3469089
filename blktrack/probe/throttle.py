"""A write that has to wait, as its cgroup may not write faster (cgroup-v2.rst on io.max, or
cgroup-v1/blkio-controller.rst)."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from blktrack.probe.devices import Absent
from blktrack.probe.room import Room
from blktrack.sysfs import BlockDevice, mounts
from blktrack.units import KIB, MIB

_RATE, _SIZE = 4 * MIB, 512 * KIB  # an eighth of a second
_TIME = 30.0  # seconds after which it is given up
# The whole process moves, so it is one of its own.
_SCRIPT = 'echo $$ >"$1/cgroup.procs" && exec dd if=/dev/zero of="$2" bs="$3" seek="$4" '
_SCRIPT += "count=1 oflag=direct conv=notrunc status=none"


def write(room: Room, device: BlockDevice, start: int) -> tuple[int, int]:
    """Absent where no limit can be set or it holds nothing up."""
    number = f"{device.number[0]}:{device.number[1]}"
    parent, file, limit = _controller(number)
    group = parent / room.folder.name
    room.note("cgroup", str(group))
    try:
        try:
            group.mkdir()
            (group / file).write_text(limit)
        except OSError as error:
            raise Absent(f"{group / file}: {error.strerror}") from error
        begun = time.monotonic()
        words = [str(group), device.path, str(_SIZE), str(start // _SIZE)]
        try:
            done = subprocess.run(
                ["sh", "-c", _SCRIPT, "sh", *words],
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIME,
                start_new_session=True,  # Ctrl-C is meant for the probe as a whole
            )
        except subprocess.TimeoutExpired as error:
            raise Absent(f"the limit held a write up for more than {_TIME:.0f} s") from error
        if done.returncode:
            raise Absent(" ".join(done.stderr.split()) or "dd failed")
        if time.monotonic() - begun < _SIZE / _RATE / 2:
            raise Absent(f"{file} holds nothing up")
        return start, _SIZE
    finally:
        room.undo("cgroup")


def _controller(number: str) -> tuple[Path, str, str]:
    """Where cgroups with limits of I/O can be made, the file of the limit and what goes there."""
    reason = "no cgroup file system is mounted"
    for mount in mounts():
        if mount.kind == "cgroup2":
            try:
                allowed = (mount.point / "cgroup.subtree_control").read_text().split()
            except OSError:
                continue
            if "io" in allowed:
                return mount.point, "io.max", f"{number} wbps={_RATE}"
            reason = f"the io controller is not enabled in {mount.point}"
        elif mount.kind == "cgroup" and "blkio" in mount.options.split(","):
            file = "blkio.throttle.write_bps_device"
            if (mount.point / file).exists():
                return mount.point, file, f"{number} {_RATE}"
    raise Absent(reason)
