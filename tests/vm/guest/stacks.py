"""Device stacks, made of what the kernel has and taken down with the lab they were made in.

There is no udev inside: dmsetup and lvm make the nodes below /dev/mapper themselves, and names are
those of the kernel, so that one machine has no two stacks at the same time.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blktrack import linux
from blktrack.sysfs import SYSFS
from blktrack.units import KIB, MIB, SECTOR
from tests.blockdev import Lab, run, wait_until
from tests.vm import disks

# The device to be tracked, and others through which it changes: the disk of a partition.
Made = list[str]
Make = Callable[[Lab, int], Made]


@dataclass(frozen=True)
class Stack:
    name: str
    make: Make  # of about as many bytes
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()  # as tests/needs.py names them
    refused: str = ""  # why `track` does not take it, a part of the message
    rw_page: bool = False  # may be written without bios on kernels that have rw_page

    def build(self, lab: Lab, size: int) -> Made:
        """Made, and taken down with the lab."""
        if self.modules:
            run("modprobe", "-a", *self.modules)
        return self.make(lab, size)


STACKS: dict[str, Stack] = {}


def stack(
    name: str, *, modules: str = "", tools: str = "", refused: str = "", rw_page: bool = False
) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        assert name not in STACKS, name
        words = tuple(modules.split()), tuple(tools.split())
        STACKS[name] = Stack(name, make, *words, refused, rw_page)
        return make

    return register


# Disks


def scsi_debug(lab: Lab, size: int, sector: int) -> str:
    """Memory behind the SCSI layer, with discards and write-same."""
    run(
        "modprobe", "scsi_debug", f"dev_size_mb={-(-size // MIB)}", f"sector_size={sector}",
        "lbpu=1", "lbpws=1", "lbpws10=1", "ndelay=20000",
    )  # fmt: skip
    # Its commands may still be on their way when the last of them was answered.
    lab.stack.callback(until_done, "rmmod", "scsi_debug")
    found: list[Path] = []

    def met() -> bool:
        adapters = SYSFS / "bus/pseudo/drivers/scsi_debug"
        found[:] = adapters.glob("adapter*/host*/target*/*/block/*")
        return bool(found) and Path(f"/dev/{found[0].name}").exists()

    wait_until(met, "the disk of scsi_debug")
    return f"/dev/{found[0].name}"


def null_blk(lab: Lab, size: int, sector: int = SECTOR, **more: object) -> str:
    """A disk of the driver, in memory, made through configfs."""
    config = Path("/sys/kernel/config")
    if not (config / "nullb").exists():
        # nr_devices: the driver makes none by itself.
        run("modprobe", "null_blk", "nr_devices=0")
        if not (config / "nullb").exists():
            run("mount", "-t", "configfs", "configfs", config)
    folder = config / "nullb" / "stack"
    folder.mkdir()
    lab.stack.callback(folder.rmdir)
    settings = {"memory_backed": 1, "size": size // MIB, "blocksize": sector, "discard": 1, **more}
    for name, value in {**settings, "power": 1}.items():
        (folder / name).write_text(str(value), encoding="ascii")
    lab.stack.callback((folder / "power").write_text, "0", "ascii")
    name = f"nullb{(folder / 'index').read_text(encoding='ascii').strip()}"
    if not Path(f"/sys/block/{name}").exists():  # 6.12 calls it as its folder
        name = "stack"
    wait_until(lambda: Path(f"/dev/{name}").exists(), name)
    return f"/dev/{name}"


def brd(lab: Lab, size: int) -> str:
    run("modprobe", "brd", "rd_nr=1", f"rd_size={size // KIB}", "max_part=8")
    lab.stack.callback(until_done, "rmmod", "brd")
    wait_until(lambda: Path("/dev/ram0").exists(), "/dev/ram0")
    return "/dev/ram0"


def until_done(*command: str) -> None:
    """What is refused while a late close or a late request is under way."""

    def met() -> bool:
        with contextlib.suppress(Exception):
            run(*command)
            return True
        return False

    wait_until(met, " ".join(command))


def partition(lab: Lab, disk: str, block: int = SECTOR) -> Made:
    """One of odd edges, as large as the disk allows."""
    size = size_of(disk) // block * block
    start = 63 * block
    run("addpart", disk, "1", str(start // SECTOR), str((size - start - 9 * block) // SECTOR))
    node = f"{disk}p1" if disk[-1].isdigit() else f"{disk}1"
    lab.stack.callback(until_done, "delpart", disk, "1")
    wait_until(lambda: Path(node).exists(), node)
    return [node, disk]


def size_of(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return linux.device_size(fd)
    finally:
        os.close(fd)


def disk(
    name: str, make: Callable[[Lab, int], str], *, block: int = SECTOR, modules: str = "",
    rw_page: bool = False, parted: bool = True,
) -> None:  # fmt: skip
    """A disk and a partition of one, two stacks."""
    stack(name, modules=modules, rw_page=rw_page)(lambda lab, size: [make(lab, size)])
    if parted:
        stack(f"{name}-partition", modules=modules, rw_page=rw_page)(
            lambda lab, size: partition(lab, make(lab, size), block)
        )


def _of_machine(serial: str) -> Callable[[Lab, int], str]:
    return lambda _, __: disks.find(serial)


disk("scsi_debug-512", lambda lab, size: scsi_debug(lab, size, SECTOR), modules="sd_mod")
disk("scsi_debug-4096", lambda lab, size: scsi_debug(lab, size, 4096), modules="sd_mod", block=4096)
disk("null_blk", null_blk)
disk("null_blk-4096", lambda lab, size: null_blk(lab, size, 4096), block=4096, parted=False)
disk("brd", brd, rw_page=True)
disk("loop", Lab.loop)
disk("loop-4096", lambda lab, size: lab.loop(size, sector=4096), block=4096, parted=False)
disk("zram", Lab.zram, modules="zram", rw_page=True, parted=False)  # the kernel parts none
disk("virtio-blk", _of_machine("blk"))
disk("virtio-scsi", _of_machine("scsi"))
disk("nvme-512", _of_machine("nvme"))
disk("nvme-4096", _of_machine("nvme4k"), block=4096)


# Device-mapper, by its own tables


def dm(lab: Lab, target: str, size: int, arguments: str) -> str:
    """A volume of one target: `arguments` follow its start and length."""
    name = f"t-{target}"
    run("dmsetup", "create", name, "--table", f"0 {size // SECTOR} {target} {arguments}")
    lab.stack.callback(run, "dmsetup", "remove", "--retry", name)
    wait_until(lambda: Path(f"/dev/mapper/{name}").exists(), name)
    return f"/dev/mapper/{name}"


def over_loop(name: str, arguments: str, *, module: str = "", sector: int = SECTOR) -> None:
    """A target over a loop device, {0} in its arguments."""
    target = name.partition("-4096")[0].removeprefix("dm-")

    def make(lab: Lab, size: int) -> Made:
        return [dm(lab, target, size, arguments.format(lab.loop(size, sector=sector)))]

    stack(name, modules=module or f"dm-{target}", tools="dmsetup")(make)


_KEY = "00112233445566778899aabbccddeeff" * 2
over_loop("dm-linear", "{0} 0", module="dm-mod")
over_loop("dm-linear-4096", "{0} 0", module="dm-mod", sector=4096)
over_loop("dm-crypt", f"aes-xts-plain64 {_KEY} 0 {{0}} 0 1 allow_discards")
over_loop(
    "dm-crypt-4096",
    f"aes-xts-plain64 {_KEY} 0 {{0}} 0 3 allow_discards sector_size:4096 iv_large_sectors",
)
over_loop("dm-delay", "{0} 0 2")  # milliseconds
over_loop("dm-flakey", "{0} 0 60 0")  # always up
stack("dm-linear-parted", modules="dm-mod", tools="dmsetup")(  # what kpartx makes
    lambda lab, size: [dm(lab, "linear", size - MIB, f"{lab.loop(size)} 63")]
)


@stack("dm-era", modules="dm-era", tools="dmsetup")
def _era(lab: Lab, size: int) -> Made:
    return [dm(lab, "era", size, f"{lab.loop(4 * MIB)} {lab.loop(size)} 128")]


@stack("dm-cache", modules="dm-cache dm-cache-smq", tools="dmsetup")
def _cache(lab: Lab, size: int) -> Made:
    """Writeback: most writes never reach the origin while it runs."""
    meta, fast, origin = lab.loop(4 * MIB), lab.loop(16 * MIB), lab.loop(size)
    return [dm(lab, "cache", size, f"{meta} {fast} {origin} 128 1 writeback smq 0")]


@stack("dm-multipath", modules="sd_mod dm-multipath dm-round-robin", tools="dmsetup")
def _multipath(lab: Lab, size: int) -> Made:
    """Driven by requests, unlike the other targets."""
    disk = scsi_debug(lab, size, SECTOR)
    return [dm(lab, "multipath", size, f"0 0 1 1 round-robin 0 1 1 {disk} 1000")]


# LVM


def group(lab: Lab, *volumes: str) -> str:
    run("vgcreate", "-q", "stackvg", *volumes)
    lab.stack.callback(run, "vgremove", "-q", "-f", "-y", "stackvg")
    return "stackvg"


def logical(lab: Lab, size: int, *options: str, parts: int = 3, each: int = 0) -> Made:
    """A volume of a group of loop devices that are too small to hold it alone."""
    each = each or size // 2 + 8 * MIB
    name = group(lab, *(lab.loop(each) for _ in range(parts)))
    run("lvcreate", "-q", "-y", "-W", "n", "-n", "lv", "-L", f"{size}b", *options, name)
    return ["/dev/mapper/stackvg-lv"]


stack("lvm-linear", modules="dm-mod", tools="lvm")(logical)
stack("lvm-striped", modules="dm-mod", tools="lvm")(
    lambda lab, size: logical(lab, size, "-i", "2", "-I", "64k")
)
stack("lvm-raid1", modules="dm-raid raid1", tools="lvm")(
    lambda lab, size: logical(
        lab, size, "--type", "raid1", "-m", "1", parts=2, each=size + 16 * MIB
    )
)


@stack("lvm-snapshot", modules="dm-snapshot", tools="lvm")
def _snapshot(lab: Lab, size: int) -> Made:
    """The origin of a snapshot, which holds all of it."""
    made = logical(lab, size, each=size + 16 * MIB)
    extents = f"{size + 8 * MIB}b"
    run("lvcreate", "-q", "-y", "-s", "-n", "snap", "-L", extents, "stackvg/lv")
    return made


def thin(lab: Lab, size: int) -> Made:
    name = group(lab, lab.loop(3 * size))
    pool = ["-T", "-L", f"{2 * size}b", "--poolmetadatasize", "4m", "--chunksize", "64k"]
    run("lvcreate", "-q", "-y", *pool, f"{name}/pool")
    run("lvcreate", "-q", "-y", "-T", "-V", f"{size}b", "-n", "lv", f"{name}/pool")
    return ["/dev/mapper/stackvg-lv"]


stack("lvm-thin", modules="dm-thin-pool", tools="lvm")(thin)


@stack("lvm-thin-snapshot", modules="dm-thin-pool", tools="lvm")
def _thin_snapshot(lab: Lab, size: int) -> Made:
    made = thin(lab, size)
    run("lvcreate", "-q", "-y", "-s", "-n", "snap", "stackvg/lv")
    return made


# md


def md(lab: Lab, level: int, members: list[str], *options: str) -> str:
    node = "/dev/md100"
    run(
        "mdadm", "--create", node, "--run", "--quiet", "--metadata=1.2",
        f"--level={level}", f"--raid-devices={len(members)}", *options, *members,
    )  # fmt: skip
    lab.stack.callback(until_done, "mdadm", "--stop", "--quiet", node)
    wait_until(lambda: Path(node).exists(), node)
    return node


def array(
    lab: Lab, size: int, level: int, count: int, *, missing: int = 0, resync: bool = False
) -> str:
    """Resyncing: as slowly as md can, so that it goes on to the end of the test."""
    data = {0: count, 1: 1, 5: count - 1, 10: count // 2}[level]
    # The start of a member is md's own: at most so much of one as small as this.
    members = [lab.loop(size // data + 2 * MIB) for _ in range(count - missing)]
    members += ["missing"] * missing
    slow = Path("/proc/sys/dev/raid/speed_limit_min")
    if resync:
        limits = {slow: "1", slow.with_name("speed_limit_max"): "50"}
        for path, value in limits.items():
            lab.stack.callback(path.write_text, path.read_text(encoding="ascii"), "ascii")
            path.write_text(value, encoding="ascii")
    options = ["--chunk=64"] if level == 0 else ["--bitmap=none"]
    if level and not resync:
        options.append("--assume-clean")
    node = md(lab, level, members, *options)
    if resync:
        action = SYSFS / "block/md100/md/sync_action"
        wait_until(lambda: action.read_text(encoding="ascii").strip() != "idle", "a resync")
    return node


def redundant(level: int, count: int) -> None:
    """Whole, degraded and resyncing, three stacks."""
    modules = "raid456" if level == 5 else f"raid{level}"

    def add(state: str, *, missing: int = 0, resync: bool = False) -> None:
        def make(lab: Lab, size: int) -> Made:
            return [array(lab, size, level, count, missing=missing, resync=resync)]

        stack(f"md-raid{level}{state}", modules=modules, tools="mdadm")(make)

    add("")
    add("-degraded", missing=1)
    add("-resyncing", resync=True)


redundant(1, 2)
redundant(5, 3)
redundant(10, 4)
stack("md-raid0", modules="raid0", tools="mdadm")(lambda lab, size: [array(lab, size, 0, 2)])
stack("md-raid1-partition", modules="raid1", tools="mdadm")(
    lambda lab, size: partition(lab, array(lab, size, 1, 2))
)


@stack("lvm-on-md-on-partitions", modules="raid1 dm-mod", tools="mdadm lvm")
def _tower(lab: Lab, size: int) -> Made:
    members = [partition(lab, lab.loop(size + 16 * MIB))[0] for _ in range(2)]
    name = group(lab, md(lab, 1, members, "--bitmap=none", "--assume-clean"))
    run("lvcreate", "-q", "-y", "-W", "n", "-n", "lv", "-L", f"{size}b", name)
    return ["/dev/mapper/stackvg-lv"]


# bcache


@stack("bcache", modules="bcache", tools="make-bcache")
def _bcache(lab: Lab, size: int) -> Made:
    """Writeback."""
    backing, fast = lab.loop(size), lab.loop(24 * MIB)
    run("make-bcache", "--writeback", "--bucket", "64k", "-B", backing, "-C", fast)
    known = set(Path("/sys/block").glob("bcache*"))
    control = Path("/sys/fs/bcache")
    wait_until((control / "register").exists, f"{control}/register")
    for path in (fast, backing):
        (control / "register").write_text(path, encoding="ascii")
    found: list[Path] = []

    def met() -> bool:
        found[:] = set(Path("/sys/block").glob("bcache*")) - known
        return bool(found) and Path(f"/dev/{found[0].name}").exists()

    wait_until(met, "the disk of bcache")

    def stop() -> None:
        (found[0] / "bcache/stop").write_text("1", encoding="ascii")
        wait_until(lambda: not found[0].exists(), f"the end of {found[0].name}")
        for cache in control.glob("*-*"):
            (cache / "stop").write_text("1", encoding="ascii")
        wait_until(lambda: not list(control.glob("*-*")), "the end of the cache set")

    lab.stack.callback(stop)
    return [f"/dev/{found[0].name}"]


# What cannot be tracked soundly


@stack("null_blk-zoned", refused="zoned device")
def _zoned(lab: Lab, size: int) -> Made:
    return [null_blk(lab, size, zoned=1, zone_size=4)]


@stack("pmem", modules="nd_e820 nd_pmem", refused="DAX mappings")
def _pmem(lab: Lab, size: int) -> Made:
    """Memory that the kernel was told to take for persistent: tests/vm/machines.py."""
    wait_until(lambda: Path("/dev/pmem0").exists(), "/dev/pmem0")
    return ["/dev/pmem0"]


@stack("nvme-multipath-head", modules="nvme-loop", tools="nvme", refused="NVMe multipath head")
def _head(lab: Lab, size: int) -> Made:
    """A target and its host in one kernel: its namespaces are shared ones, so they get a head."""
    name, top = "blktrack-stack", Path("/sys/kernel/config/nvmet")
    if not top.exists():
        run("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
    subsystem, port = top / "subsystems" / name, top / "ports/1"
    space = subsystem / "namespaces/1"
    for folder in (subsystem, space, port):
        folder.mkdir()
        lab.stack.callback(folder.rmdir)
    for path, value in {
        subsystem / "attr_allow_any_host": "1",
        space / "device_path": lab.loop(size),
        space / "enable": "1",
        port / "addr_trtype": "loop",
    }.items():
        path.write_text(value, encoding="ascii")
    lab.stack.callback((space / "enable").write_text, "0", "ascii")
    link = port / "subsystems" / name
    link.symlink_to(subsystem)
    lab.stack.callback(link.unlink)
    host = str(uuid.uuid4())
    names = [f"--hostnqn=nqn.2014-08.org.nvmexpress:uuid:{host}", f"--hostid={host}"]
    run("nvme", "connect", "-t", "loop", "-n", name, *names)
    lab.stack.callback(run, "nvme", "disconnect", "-n", name)
    found: list[Path] = []

    def met() -> bool:
        for each in Path("/sys/class/nvme-subsystem").glob("nvme-subsys*"):
            if (each / "subsysnqn").read_text(encoding="ascii").strip() == name:
                found[:] = [p for p in each.glob("nvme*n*") if Path(f"/dev/{p.name}").exists()]
        return bool(found)

    wait_until(met, "the namespace of the target")
    return [f"/dev/{found[0].name}"]
