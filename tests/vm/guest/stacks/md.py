"""Arrays of loop devices, and what lies on them."""

from __future__ import annotations

from pathlib import Path

from blktrack.sysfs import SYSFS
from blktrack.units import MIB
from tests.blockdev import Lab, run, wait_until
from tests.vm.disks import until_done
from tests.vm.guest.stacks.disks import partition
from tests.vm.guest.stacks.lvm import group
from tests.vm.guest.stacks.registry import Made, stack


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
