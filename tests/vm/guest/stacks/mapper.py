"""Device-mapper, by its own tables."""

from __future__ import annotations

from pathlib import Path

from blktrack.units import MIB, SECTOR
from tests.blockdev import Lab, run, wait_until
from tests.vm.guest.stacks.disks import scsi_debug
from tests.vm.guest.stacks.registry import Made, stack


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
