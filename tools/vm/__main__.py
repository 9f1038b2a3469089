"""A shell inside, to try something by hand: python -m tools.vm KERNEL [DISK…].

A DISK is KIND[:SECTOR], as nvme:4096: 1 GiB of holes that go with the machine. Ctrl-A X ends it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.vm import kernels, packages
from tools.vm.disk import Disk
from tools.vm.machine import Machine
from tools.vm.packages import FetchError

# The console becomes the terminal of a session of its own, so that Ctrl-C reaches what runs in it.
_SHELL = "setsid -c bash -i <>/dev/ttyS0 >&0 2>&1"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.vm", description=__doc__)
    parser.add_argument("kernel", choices=list(kernels.SUITES))
    parser.add_argument("disk", nargs="*", help="virtio-blk, virtio-scsi or nvme, with :SECTOR")
    given = parser.parse_args()
    packages.cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages.cache(), prefix="shell-") as name:
        folder = Path(name)
        try:
            kernel, layer = kernels.kernel(given.kernel), packages.guest_layer()
        except FetchError as error:
            print(error, file=sys.stderr)
            return 1
        disks = [_disk(folder, number, word) for number, word in enumerate(given.disk)]
        machine = Machine(kernel, layer, folder, disks)
        machine.prepare(_SHELL)
        return subprocess.run(machine.command(serial="mon:stdio"), check=False).returncode


def _disk(folder: Path, number: int, word: str) -> Disk:
    kind, _, sector = word.partition(":")
    disk = Disk(f"disk{number}", folder / f"disk{number}.img", kind, int(sector or 512))
    disk.create(1 << 30)
    return disk


if __name__ == "__main__":
    sys.exit(main())
