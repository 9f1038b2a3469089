"""The disks of a machine: raw images, and what qemu makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DRIVERS = {  # of each kind, as no udevd loads them
    "virtio-blk": ("virtio_blk",),
    "virtio-scsi": ("virtio_scsi", "sd_mod"),
    "nvme": ("nvme",),
    "nvme-shared": ("nvme",),
}


@dataclass(frozen=True)
class Disk:
    """A disk of the machine over a raw image. Inside it is found by its serial number.

    With `log`, every write, discard and flush that reaches it is recorded there, in the format of
    dm-log-writes (qemu's block driver blklogwrites).
    """

    serial: str  # at most 20 characters
    image: Path
    kind: str = "virtio-blk"  # or virtio-scsi, nvme, nvme-shared
    sector: int = 512
    log: Path | None = None
    options: str = ""  # more properties of the qemu device, "name=value,…"
    rate: int = 0  # writes a second that are let through: others wait, in flight; 0: all are

    def create(self, size: int) -> None:
        """A new image, of holes."""
        with self.image.open("xb") as made:
            made.truncate(size)

    def words(self, number: int) -> list[str]:
        """The arguments of qemu. Writes go to the cache of the host, which outlives the machine."""
        node = f"disk{number}"
        words = _blockdev(f"{node}-file", driver="file", filename=self.image, discard="unmap")
        words += _blockdev(node, driver="raw", file=f"{node}-file", discard="unmap")
        if self.log:
            self.log.touch()
            words += _blockdev(f"{node}-log", driver="file", filename=self.log)
            words += _blockdev(
                f"{node}-logged",
                driver="blklogwrites",
                file=node,
                log=f"{node}-log",
                discard="unmap",  # a node without it drops discards, and logs none
                # The count of entries is with each of them, so that it is true after a power cut.
                **{"log-sector-size": self.sector, "log-super-update-interval": 1},
            )
            node += "-logged"
        if self.rate:
            group = f"{node}-rate"
            words += ["-object", f"throttle-group,id={group},x-iops-write={self.rate}"]
            words += _blockdev(
                f"{node}-slow",
                driver="throttle",
                file=node,
                discard="unmap",
                **{"throttle-group": group},
            )
            node += "-slow"
        sectors = f"logical_block_size={self.sector},physical_block_size={self.sector}"
        common = f"drive={node},serial={self.serial},{sectors}"
        if self.options:
            common += f",{self.options}"
        match self.kind:
            case "virtio-blk":
                if self.log:
                    # qemu makes one request of what is adjacent, of up to IOV_MAX pieces. The log
                    # adds two to them, and such a request fails.
                    common += ",request-merging=off"
                return [*words, "-device", f"virtio-blk-pci,{common}"]
            case "virtio-scsi":
                bus = f"scsi{number}"
                words += ["-device", f"virtio-scsi-pci,id={bus}"]
                return [*words, "-device", f"scsi-hd,bus={bus}.0,{common}"]
            case "nvme":
                return [*words, "-device", f"nvme,{common}"]
            case "nvme-shared":
                # Linux makes a multipath head of what several controllers may have.
                group, control = f"group{number}", f"control{number}"
                words += ["-device", f"nvme-subsys,id={group}"]
                words += ["-device", f"nvme,id={control},serial={self.serial},subsys={group}"]
                space = f"nvme-ns,drive={node},bus={control},shared=on,{sectors}"
                return [*words, "-device", space]
        raise ValueError(f"no kind of disk: {self.kind}")


def _blockdev(node: str, **options: object) -> list[str]:
    named = {"node-name": node, **options}
    values = (f"{key}={str(value).replace(',', ',,')}" for key, value in named.items())
    return ["-blockdev", ",".join(values)]
