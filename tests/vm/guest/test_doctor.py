"""The running kernel is as was asked for, and what `doctor` says of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.probe.probes import PROBES
from tests.blockdev import Lab, run, written_by_page

pytestmark = pytest.mark.needs("root", "bpf")


@pytest.mark.brief
def test_kernel_is_the_one_asked_for(kernel: str) -> None:
    assert kernel == "newest" or os.uname().release.startswith(f"{kernel}.")


@pytest.mark.needs("dmsetup")
def test_doctor_finds_all_in_order(
    lab: Lab, record_property: Callable[[str, object], None]
) -> None:
    """Here every kind of scratch device is to be had, and nearly every probe."""
    run("modprobe", "null_blk", "nr_devices=0")
    run("modprobe", "zram", "num_devices=0")
    run("modprobe", "dm-mod")
    run("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
    lab.stack.callback(run, "umount", "/sys/kernel/config")
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+io", encoding="ascii")
    done = lab.blktrack("doctor", "--probe", "--json")
    assert done.code == 0, done.out
    probe = done.json["probe"]
    assert probe["ok"]
    verdicts = {kind["kind"]: (kind["verdict"], kind["reason"]) for kind in probe["kinds"]}
    assert verdicts.pop("loop") == ("trusted", "")
    assert verdicts.pop("dm") == ("trusted", "")
    verdict, reason = verdicts.pop("zram")
    assert verdict == ("not trusted" if written_by_page() else "trusted"), reason
    assert ("page by page" in reason) == written_by_page()
    # null_blk is request-based since Linux 6.10: 8b631f9cf0b8
    assert verdicts.pop("null_blk")[0] in ("trusted", "not probed")
    assert not verdicts
    passed = {
        each["name"]
        for kind in probe["kinds"]
        for each in kind["probes"]
        if each["result"] == "passed"
    }
    assert passed == {each.name for each in PROBES}
    words = ", ".join(f"{kind['kind']} {kind['verdict']}" for kind in probe["kinds"])
    record_property("measured", f"doctor --probe: {words}, in {probe['duration_s']:.1f} s")
