"""Disks, and a partition of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blktrack.sysfs import SYSFS
from blktrack.units import KIB, MIB, SECTOR
from tests.blockdev import Lab, run, wait_until
from tests.vm import disks
from tests.vm.disks import until_done
from tests.vm.guest.stacks.registry import Made, stack


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


def partition(lab: Lab, disk: str, block: int = SECTOR) -> Made:
    """One of odd edges, as large as the disk allows."""
    size = disks.size_of(disk) // block * block
    start = 63 * block
    return [disks.part(lab, disk, 1, start, size - start - 9 * block), disk]


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
