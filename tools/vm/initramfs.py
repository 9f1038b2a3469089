"""What a kernel needs to reach the root of the host: busybox, a few modules, a script.

The script puts an overlay over what qemu shares by 9p, read-only: the host's root, the layer of
packages, the modules of the kernel. What is written lies in memory or, with ROOT_DISK, on a disk.
Then it hands over to `init` of the share that is written to. Nothing of the host is changed by what
happens inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.vm.kernels import Kernel

MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
# ext4 asks for the checksum by its name, which modprobe would load.
_ROOT_MODULES = ("virtio_blk", "crc32c_generic", "ext4")
BUSYBOX = "/usr/bin/busybox"  # inside, of the layer
SHARE = "/vm"  # inside: where the folder of the machine is
KEPT = "/kept"  # inside: what all machines may leave to each other
# An argument of the kernel: what is written to the root lies on the first virtio disk, an ext4, to
# be seen below DISK_ROOT as well.
ROOT_DISK, DISK_ROOT = "blktrack.root=vda", "/media/root"

# Linux's Documentation/filesystems/9p.rst. `loose` lets the guest keep what it read: nobody writes
# to these while it runs. The share has no cache, so that both sides see each line as it is written.
_9P = "trans=virtio,version=9p2000.L,msize=512000"

_INIT = f"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /dev /host /layer /kernel /memory /whole /new
for module in $(cat /modules/order); do insmod /modules/$module; done
for tree in host layer kernel; do mount -t 9p -o {_9P},cache=loose,ro $tree /$tree; done
mount -t proc proc /proc
if grep -q {ROOT_DISK} /proc/cmdline; then
    mount -t devtmpfs dev /dev
    mount -t ext4 /dev/vda /memory || poweroff -f
    umount /dev
else
    mount -t tmpfs none /memory
fi
umount /proc
mkdir -p /memory/upper /memory/work
mount -t overlay -o lowerdir=/kernel:/layer:/host,upperdir=/memory/upper,workdir=/memory/work \\
    root /whole
mount --bind /whole /new
cd /new
mkdir -p proc sys dev run tmp .{SHARE} .{KEPT}
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mkdir -p .{DISK_ROOT}
mount --bind /memory .{DISK_ROOT}
# The working tree may be in one of those.
while read -r path; do
    mkdir -p ./$path
    mount --bind /whole$path ./$path
done </hidden
mount -t 9p -o {_9P},cache=none share .{SHARE}
mount -t 9p -o {_9P},cache=none kept .{KEPT}
exec switch_root /new {BUSYBOX} sh {SHARE}/init
"""


def hidden(paths: Sequence[Path]) -> list[Path]:
    """Those that the file systems of the guest would cover."""
    return [path for path in paths if path.parts[1] in ("dev", "run", "tmp")]


def build(kernel: Kernel, busybox: Path, keep: Sequence[Path]) -> bytes:
    """The archive, for the kernel to unpack. The directories `keep` are seen inside in any case."""
    archive = Archive()
    for folder in ("bin", "modules"):
        archive.add(folder, b"", 0o040755)
    archive.add("bin/busybox", busybox.read_bytes(), 0o100755)
    archive.add("init", _INIT.encode(), 0o100755)
    archive.add("hidden", "".join(f"{path}\n" for path in hidden(keep)).encode(), 0o100644)
    needed = order(kernel)
    for path in needed:
        archive.add(f"modules/{path.name}", path.read_bytes(), 0o100644)
    archive.add("modules/order", "\n".join(path.name for path in needed).encode(), 0o100644)
    return archive.finish()


def order(kernel: Kernel) -> list[Path]:
    """The files of these modules, each after what it needs. One that is not there is built in."""
    needs = dict[str, list[str]]()
    for line in (kernel.modules / "modules.dep").read_text(encoding="ascii").splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    names = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    found: list[str] = []

    def visit(path: str) -> None:
        for other in needs[path]:
            visit(other)
        if path not in found:
            found.append(path)

    for name in MODULES + _ROOT_MODULES:
        if name in names:
            visit(names[name])
    return [kernel.modules / path for path in found]


class Archive:
    """cpio's format "newc": Linux's Documentation/driver-api/early-userspace/buffer-format.rst."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, data: bytes, mode: int) -> None:
        self._count += 1
        links, path = 1, name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        for part in (head, data):
            self._parts.append(part + bytes(-len(part) % 4))

    def finish(self) -> bytes:
        self.add("TRAILER!!!", b"", 0)
        return b"".join(self._parts)
