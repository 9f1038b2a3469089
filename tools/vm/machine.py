"""One virtual machine: its disks, its life, its end.

A machine lives in a folder: `share` is /vm inside, `console.log` what the kernel said, and a shell
script is all that it runs. It ends with its script, with its time limit, or with us: the kernel
kills it when the thread that started it ends, however that comes about.
"""

from __future__ import annotations

import compileall
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tools.vm import initramfs
from tools.vm.disk import DRIVERS, Disk
from tools.vm.initramfs import BUSYBOX, SHARE
from tools.vm.kernels import Kernel
from tools.vm.packages import TOP, cache

QEMU = "qemu-system-x86_64"
# What was translated of a program serves its next process as well where that lies at the same
# addresses: norandmaps saves a fifth of the time.
_ARGUMENTS = (
    "nokaslr norandmaps mitigations=off init_on_alloc=0 tsc=reliable panic=-1 console=ttyS0 quiet"
)
_STATUS, _READY = "status", "ready"
# What later processors have, as AVX, is emulated more slowly than what code does without it: a boot
# takes a sixth longer with "max". This one has instructions for AES and CRC, and numpy's least.
_EMULATED, _CPU = "tcg,thread=multi", "Westmere,+rdrand"

# PID 1 inside, of busybox, most of whose commands are its own: makes the system whole, runs the
# script, says how it ended and switches off.
_INSIDE = f"""\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
# There is no udevd to wait for: dmsetup and lvm make their own nodes.
export DM_DISABLE_UDEV=1 LVM_SUPPRESS_FD_WARNINGS=1
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
ln -s /proc/self/fd /dev/fd
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /run/lock /run/lvm /run/cryptsetup /etc/lvm
hostname guest
ip link set lo up
/sbin/modprobe -a $(cat {SHARE}/modules)
if [ -e /sys/class/net/eth0 ]; then # as qemu's user network has it
    ip addr add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    ip route add default via 10.0.2.2
fi
cat >/etc/lvm/lvmlocal.conf <<'END'
activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}
devices {{ obtain_device_list_from_udev=0 external_device_info_source="none" use_devicesfile=0 }}
global {{ event_activation=0 }}
END
cd /
: >{SHARE}/{_READY}
/bin/sh {SHARE}/run >{SHARE}/output 2>&1 </dev/null
echo $? >{SHARE}/{_STATUS}.new
mv {SHARE}/{_STATUS}.new {SHARE}/{_STATUS}
sync
exec poweroff -f
"""


class MachineError(Exception):
    """A machine did not end as its script says; the message has the end of its console."""


class Machine:
    def __init__(
        self,
        kernel: Kernel,
        layer: Path,
        folder: Path,
        disks: Sequence[Disk] = (),
        *,
        memory: int = 1024,
        arguments: str = "",
        network: Sequence[str] | None = None,
    ) -> None:
        """`layer` is packages.guest_layer(), `memory` in MiB, `arguments` more for the kernel.

        network -- words before qemu's, by which it runs where the machine is to connect from
        (`nsenter --net=…`, or none for this host's own network). None: the machine has no network.
        """
        self.kernel = kernel
        self.layer = layer
        self.folder = folder
        self.disks = tuple(disks)
        self.memory = memory
        self.arguments = arguments
        self.network = network
        self.share = folder / "share"
        self.console = folder / "console.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, script: str, environment: Mapping[str, str] | None = None) -> None:
        """Boot it, to run `script` by a shell as root, in the working tree. May be done again."""
        self.kill()
        self.prepare(script, environment)
        with (self.folder / "qemu.log").open("wb") as said:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                process_group=0,  # a session would have a weight of its own: sched(7), autogroup
            )

    def prepare(self, script: str, environment: Mapping[str, str] | None = None) -> None:
        """Write what the boot reads."""
        for folder in (self.share, kept()):
            folder.mkdir(parents=True, exist_ok=True)
        for name in (_READY, _STATUS):
            (self.share / name).unlink(missing_ok=True)
        exports = [f"export {key}={shlex.quote(to)}" for key, to in (environment or {}).items()]
        lines = [*exports, f"cd {shlex.quote(str(TOP))}", script, ""]
        (self.share / "run").write_text("\n".join(lines), encoding="utf-8")
        (self.share / "init").write_text(_INSIDE, encoding="utf-8")
        # With no udevd nobody loads them by themselves. What is in the kernel is no error.
        drivers = {name for disk in self.disks for name in DRIVERS[disk.kind]}
        if self.network is not None:
            drivers.add("virtio_net")
        (self.share / "modules").write_text(" ".join(["loop", *sorted(drivers)]), encoding="utf-8")
        # Inside, what Python compiles is not kept.
        for name in ("blktrack", "tests", "tools"):
            compileall.compile_dir(TOP / name, quiet=2)
        busybox = self.layer / BUSYBOX.lstrip("/")
        archive = initramfs.build(self.kernel, busybox, [TOP, Path(sys.prefix)])
        (self.folder / "initramfs").write_bytes(archive)

    def command(self, serial: str = "") -> list[str]:
        """Of qemu. `serial` says where the console goes, if it is not into its file."""
        accelerator = os.environ.get("BLKTRACK_VM_ACCEL", _EMULATED)
        words = [*(self.network or ()), "setpriv", "--pdeathsig", "KILL", "--", QEMU]
        words += ["-accel", accelerator, "-cpu", _CPU if accelerator == _EMULATED else "max"]
        # PCI Express, with nothing else on the board: a fifth less of the processor for a boot.
        words += ["-machine", "q35,usb=off,sata=off,smbus=off"]
        words += ["-smp", "1", "-m", str(self.memory)]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-serial", serial or f"file:{self.console}"]
        words += ["-kernel", str(self.kernel.image), "-initrd", str(self.folder / "initramfs")]
        words += ["-append", f"{_ARGUMENTS} {self.arguments}".strip()]
        read_only = {"host": Path("/"), "layer": self.layer, "kernel": self.kernel.root}
        for tag, path in read_only.items():
            words += _share(tag, path, "readonly=on")
        words += _share("share", self.share, "readonly=off")
        words += _share("kept", kept(), "readonly=off")
        for number, disk in enumerate(self.disks):
            words += disk.words(number)
        if self.network is not None:
            words += ["-netdev", "user,id=network"]
            words += ["-device", "virtio-net-pci,netdev=network,romfile="]  # nothing boots from it
        return words

    def wait(self, limit: float) -> int:
        """The exit code of the script, within `limit` seconds. MachineError; then it is gone."""
        assert self._process is not None
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise MachineError(self._end(f"was not done after {limit:.0f} s")) from None
        try:
            return int((self.share / _STATUS).read_text(encoding="ascii"))
        except (OSError, ValueError):
            pass
        ready = (self.share / _READY).exists()
        raise MachineError(self._end("died" if ready else "did not boot"))

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """The power is cut: nothing inside hears of it. What qemu has written is in the images."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def until(self, name: str, limit: float) -> None:
        """Wait for the file `name` in the share. MachineError if the machine ends before."""
        deadline = time.monotonic() + limit
        while not (self.share / name).exists():
            if not self.running:
                raise MachineError(self._end(f"ended without making {name}"))
            if time.monotonic() > deadline:
                raise MachineError(self._end(f"made no {name} in {limit:.0f} s"))
            time.sleep(0.02)

    def _end(self, what: str) -> str:
        return f"The machine with {self.kernel.version} {what}.\n{self.tail()}"

    def tail(self, lines: int = 80) -> str:
        """The last words of the machine, of each who spoke."""
        files = (self.folder / "qemu.log", self.console, self.share / "output")
        said = []
        for file in files:
            text = file.read_bytes().decode(errors="replace") if file.exists() else ""
            if text.strip():
                said.append(f"-- {file}\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def kept() -> Path:
    """What is KEPT inside."""
    return cache() / "kept"


def _share(tag: str, path: Path, *options: str) -> list[str]:
    place = str(path).replace(",", ",,")
    words = [f"local,path={place},mount_tag={tag},security_model=none,multidevs=remap", *options]
    return ["-virtfs", ",".join(words)]
