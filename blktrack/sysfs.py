"""What sysfs and procfs say about block devices. Reading only; nothing is decided here."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from blktrack.errors import UsageError
from blktrack.units import SECTOR

SYSFS = Path("/sys")
MOUNTINFO = Path("/proc/self/mountinfo")
BY_NAME = ("by-id", "by-partuuid")  # links of /dev/disk that follow the medium, best first


def read_text(path: Path | str) -> str | None:
    """A file of sysfs or procfs. Names in it may be any bytes, as file names may."""
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fsdecode(file.read()).rstrip("\n")
    except OSError:
        return None


def _number(path: Path | str, default: int = 0) -> int:
    text = read_text(path)
    return int(text) if text and text.lstrip("-").isdigit() else default


@dataclass(frozen=True)
class BlockDevice:
    """A disk, partition or volume, by the path the user gave. Numbers are bytes."""

    path: str
    name: str  # the kernel's: "sda1"
    sys: Path  # its folder in sysfs
    number: tuple[int, int]  # major, minor

    @classmethod
    def find(cls, path: str) -> BlockDevice:
        """UsageError if `path` is not a block device."""
        try:
            info = os.stat(path)
        except OSError as error:
            raise UsageError(
                f"{path}: {error.strerror}", hint="name a block device, such as /dev/sdb"
            ) from error
        if not stat.S_ISBLK(info.st_mode):
            raise UsageError(
                f"{path} is not a block device", hint="name a disk, partition or logical volume"
            )
        return cls.of_number(os.major(info.st_rdev), os.minor(info.st_rdev), path)

    @classmethod
    def of_number(cls, major: int, minor: int, path: str = "") -> BlockDevice:
        link = SYSFS / f"dev/block/{major}:{minor}"
        if not link.exists():
            raise UsageError(
                f"{path or f'{major}:{minor}'} has no device behind it",
                hint="connect it, or take another (lsblk)",
            )
        folder = link.resolve()
        name = folder.name
        return cls(path or f"/dev/{name.replace('!', '/')}", name, folder, (major, minor))

    @cached_property
    def is_partition(self) -> bool:
        return (self.sys / "partition").exists()

    @cached_property
    def disk(self) -> BlockDevice:
        """The whole disk this is a partition of, or itself."""
        if not self.is_partition:
            return self
        major, minor = (read_text(f"{self.sys.parent}/dev") or "0:0").split(":")
        return BlockDevice.of_number(int(major), int(minor))

    @property
    def present(self) -> bool:
        """Whether the kernel still has it, under this number."""
        return read_text(f"{self.sys}/dev") == f"{self.number[0]}:{self.number[1]}"

    @property
    def size(self) -> int:
        return _number(f"{self.sys}/size") * SECTOR

    @property
    def start(self) -> int:
        """Byte of the whole disk at which this begins."""
        return _number(f"{self.sys}/start") * SECTOR if self.is_partition else 0

    @property
    def block_size(self) -> int:
        """Logical block: the least the device reads or writes."""
        return self.queue_number("logical_block_size", SECTOR)

    @property
    def read_only(self) -> bool:
        return _number(f"{self.sys}/ro") == 1

    @property
    def request_based(self) -> bool:
        """Driven by blk-mq requests; otherwise only bios are ever seen."""
        return (self.disk.sys / "mq").is_dir()

    @property
    def diskseq(self) -> int:
        """Counts up with every medium the kernel meets (since 5.15); 0 where not told."""
        return _number(f"{self.disk.sys}/diskseq")

    def queue(self, attribute: str) -> str | None:
        return read_text(f"{self.disk.sys}/queue/{attribute}")

    def queue_number(self, attribute: str, default: int = 0) -> int:
        return _number(f"{self.disk.sys}/queue/{attribute}", default)

    @property
    def in_flight(self) -> int:
        """Reads and writes begun and not ended, of the whole disk."""
        return sum(int(word) for word in (read_text(f"{self.disk.sys}/inflight") or "0").split())

    @property
    def is_mapped(self) -> bool:
        """Whether its disk is one of device-mapper's."""
        return (self.disk.sys / "dm").is_dir()

    @property
    def suspended(self) -> bool:
        """Whether device-mapper holds back what is submitted to it; `in_flight` leaves that out."""
        return _number(f"{self.disk.sys}/dm/suspended") == 1

    @property
    def backing(self) -> str:
        """The file or device behind a loop device, as it was named then; "" of any other."""
        return read_text(f"{self.disk.sys}/loop/backing_file") or ""

    @property
    def holders(self) -> list[str]:
        """Devices stacked on this one or, for a disk, on its partitions."""
        found = [entry.name for entry in _entries(self.sys / "holders")]
        for part in self.partitions:
            found += [entry.name for entry in _entries(part.sys / "holders")]
        return sorted(set(found))

    @property
    def partitions(self) -> list[BlockDevice]:
        if self.is_partition:
            return []
        found = []
        for entry in _entries(self.sys):
            if (entry / "partition").exists() and (text := read_text(entry / "dev")):
                major, minor = text.split(":")
                found.append(BlockDevice.of_number(int(major), int(minor)))
        return found

    @property
    def permanent_name(self) -> str:
        """What hardware or volume manager call it, the same after a reboot; "" if nothing.

        A loop device is its backing file, a device-mapper one its uuid, others wwid or serial.
        """
        disk = self.disk.sys
        suffix = f"-part{_number(f'{self.sys}/partition')}" if self.is_partition else ""
        for source in ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial"):
            if text := read_text(f"{disk}/{source}"):
                return f"{source.rpartition('/')[2]}:{' '.join(text.split())}{suffix}"
        if backing := self.backing:
            offset = _number(f"{disk}/loop/offset")
            return f"loop:{backing}{f'@{offset}' if offset else ''}{suffix}"
        for folder in BY_NAME:
            for entry in _entries(Path("/dev/disk") / folder):
                if entry.resolve().name == self.name:
                    return f"{folder}:{entry.name}"
        return ""

    @property
    def mounts(self) -> list[Path]:
        """Mount points, in this namespace, of this device and of a disk's partitions."""
        numbers = {self.number, *(part.number for part in self.partitions)}
        wanted = {f"{major}:{minor}" for major, minor in numbers}
        return [mount.point for mount in mounts() if mount.number in wanted]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


class Mount(NamedTuple):
    number: str  # "major:minor" of what is mounted
    point: Path
    kind: str  # "ext4"
    source: str  # "/dev/sda1", or what the kind understands by it
    options: str  # of the file system: a mount of it can be read-only all the same
    id: int

    @property
    def writable(self) -> bool:
        """Whether the file system is; this mount of it need not be."""
        return self.options.partition(",")[0] != "ro"


def mounts(table: Path | None = None) -> list[Mount]:
    """This namespace's mounts, or those of `table`, in the order made (proc_pid_mountinfo(5))."""
    return [_mount(fields) for fields in _table(table)]


def mount_of(path: Path) -> Mount | None:
    """That which `path` is in."""
    place, best, found = f"{path.resolve()}/", "", None
    for fields in _table():
        point = unescape(fields[4])
        # The later of two mounts on one folder hides the earlier.
        if place.startswith(f"{point.rstrip('/')}/") and len(point) >= len(best):
            best, found = point, fields
    return _mount(found) if found else None


def mount_numbered(number: int) -> Mount | None:
    """By its id in this namespace."""
    return next((_mount(fields) for fields in _table() if fields[0] == str(number)), None)


def _table(path: Path | None = None) -> list[list[str]]:
    lines = (read_text(path or MOUNTINFO) or "").split("\n")
    return [line.split(" ") for line in lines if line]


def _mount(fields: list[str]) -> Mount:
    kind, source, options = fields[fields.index("-") + 1 :][:3]
    return Mount(
        number=fields[2],
        point=Path(unescape(fields[4])),
        kind=kind,
        source=unescape(source),
        options=unescape(options),
        id=int(fields[0]),
    )


def unescape(text: str) -> str:
    r"""A name of mountinfo or swaps, in which the kernel writes a space as `\040`."""
    if "\\" not in text:
        return text
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def filesystem_at(point: Path) -> str:
    """Kind of the file system mounted exactly there; "" if none is."""
    return next((mount.kind for mount in reversed(mounts()) if mount.point == point), "")


def memory_available() -> int:
    """Bytes that can be had without swapping, by the kernel's estimate (proc_meminfo(5))."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", read_text(Path("/proc/meminfo")) or "", re.M)
    return int(found[1]) * 1024 if found else 0


def boot_id() -> str:
    """A new one with every boot. `BLKTRACK_BOOT_ID` stands in for it, to test a reboot."""
    return os.environ.get("BLKTRACK_BOOT_ID") or (
        read_text(Path("/proc/sys/kernel/random/boot_id")) or ""
    )


def loops_backed_by(path: Path) -> list[str]:
    """Loop devices whose backing file this is, found by device and inode."""
    try:
        wanted = path.stat()
    except OSError:
        return []
    found = []
    for name in os.listdir(SYSFS / "block"):
        backing = read_text(f"{SYSFS}/block/{name}/loop/backing_file")
        if backing is None:
            continue
        try:
            info = os.stat(backing)
        except OSError:
            continue
        if (info.st_dev, info.st_ino) == (wanted.st_dev, wanted.st_ino):
            found.append(name)
    return sorted(found)
