"""bcache."""

from __future__ import annotations

from pathlib import Path

from blktrack.units import MIB
from tests.blockdev import Lab, run, wait_until
from tests.vm.guest.stacks.registry import Made, stack


@stack("bcache", modules="bcache", tools="make-bcache")
def _bcache(lab: Lab, size: int) -> Made:
    """Writeback. A cache of 512 buckets or less is too small (cache_alloc: EPERM)."""
    backing, fast = lab.loop(size), lab.loop(40 * MIB)
    run("make-bcache", "--writeback", "--bucket", "32k", "-B", backing, "-C", fast)
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
