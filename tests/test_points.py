"""Every point keeps the order of writes: of each chain it holds a prefix, and enough of it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack import capture, sync
from blktrack.errors import NoPoint
from blktrack.report import SyncReport
from blktrack.round import Options
from blktrack.units import MIB
from tests import chains
from tests.blockdev import TOP, Lab, Silent, read_image, run, told, wait_until
from tests.chains import CHAIN, Log, judge

pytestmark = pytest.mark.needs("root", "loop", "bpf")

CHAINS, WRITERS = 6, 2
PACES = {"slow": 100.0, "brisk": 1000.0, "flat out": 0.0}
KINDS = ["loop-512", pytest.param("zram", marks=pytest.mark.needs("zram"))]


@contextlib.contextmanager
def writers(device: str, log: Path, pace: float) -> Iterator[Log]:
    """Processes that write chains until the end of the context."""
    record = Log(log, CHAINS)
    running = []
    try:
        for number in range(WRITERS):
            own = ",".join(str(chain) for chain in range(number, CHAINS, WRITERS))
            words = [device, str(log), own, str(CHAINS), str(pace / WRITERS)]
            command = [sys.executable, "-m", "tests.chains", *words]
            running.append(subprocess.Popen(command, cwd=TOP))
        wait_until(lambda: bool((record.done > 2).all()), "some writes of every chain")
        yield record
        assert all(process.poll() is None for process in running), "a writer has died"
    finally:
        for process in running:
            process.kill()
            process.wait()


def points(lab: Lab, kind: str, pace: str, count: int) -> tuple[int, int, list[str]]:
    """Take so many points: how many were reached, in how many rounds, and all faults."""
    device = lab.device(kind, CHAINS * CHAIN)[0]
    replica = str(lab.name("replica"))
    lab.track(device)
    lab.sync(device, replica)
    reached, rounds, faults = 0, 0, []
    with writers(device, lab.name("log"), PACES[pace]) as log:
        for _ in range(count):
            before = read_image(replica)
            try:
                report = synced(lab, device, replica)
            except NoPoint:
                same = (read_image(replica) == before).all()
                assert same, "a replica without a new point was touched"
                continue
            assert report.consistency == "crash"
            reached += 1
            rounds += report.rounds
            image = read_image(replica)
            for chain in range(CHAINS):
                least = log.completed_before(chain, report.point)
                if fault := judge(image, chain, least).fault:
                    faults.append(f"{kind}, {pace}, epoch {report.epoch}: {fault}")
    # The source quiet: all of it.
    report = synced(lab, device, replica)
    image = read_image(replica)
    assert (image == read_image(device)).all()
    for chain in range(CHAINS):
        assert not judge(image, chain, int(log.done[chain])).fault
    return reached, rounds, faults


def synced(lab: Lab, device: str, replica: str) -> SyncReport:
    return sync.sync(lab.store, device, replica, Options(consistency="crash"), Silent())[0]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.needs(k)) for k in ("ext4", "xfs")]
)
def test_a_point_under_a_freeze_mounts_clean_and_in_order(shared: Lab, kind: str) -> None:
    """With writers flat out in a file of the source, at full speed but for the freeze."""
    device, replica = shared.loop(512 * MIB), shared.name("replica")
    run(f"mkfs.{kind}", "-q", device)
    shared.track(device)
    frozen = []
    with shared.mounted(device) as point:
        file = point / "chains"
        run(
            "dd",
            "if=/dev/zero",
            f"of={file}",
            "bs=1M",
            f"count={CHAINS * CHAIN // MIB}",
            "conv=fsync",
        )
        with writers(str(file), shared.name("log"), 0.0) as log:
            for _ in range(6):
                wanted = Options(consistency="filesystem")
                report = sync.sync(shared.store, device, str(replica), wanted, Silent())[0]
                assert report.consistency == "filesystem"
                assert 0 < report.freeze_s < 2.5
                frozen.append(report.freeze_s)
                copy = shared.name("copy")
                shutil.copy(replica, copy)
                if kind == "ext4":
                    run("e2fsck", "-f", "-n", copy)
                else:
                    # Under a freeze xfs keeps its log such that inodes unlinked but open are found.
                    with shared.mounted(str(copy), "-o", "loop,nouuid"):
                        pass
                    run("xfs_repair", "-n", "-f", copy)
                with shared.mounted(
                    str(copy), "-o", f"loop,ro{',nouuid' if kind == 'xfs' else ''}"
                ) as seen:
                    image = read_image(seen / "chains")
                for chain in range(CHAINS):
                    least = log.completed_before(chain, report.point)
                    assert not judge(image, chain, least).fault
                copy.unlink()
    told(f"{kind}: 6 points frozen for {min(frozen):.3f} to {max(frozen):.3f} s, clean, in order")


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_point_keeps_the_order_of_writes(shared: Lab, kind: str, pace: str) -> None:
    count = 50 if pace != "flat out" else 15
    reached, rounds, faults = points(shared, kind, pace, count)
    assert not faults, "\n".join(faults[:5])
    told(
        f"{kind}, {pace}: {reached} of {count} points reached, in {rounds / max(reached, 1):.1f} "
        "rounds each, all in order"
    )
    if pace == "slow":
        assert reached == count


def test_a_freeze_of_a_quiet_source_is_staged_too(shared: Lab) -> None:
    """Nothing had changed, but the freeze itself writes."""
    device, replica = shared.loop(64 * MIB), shared.name("replica")
    run("mkfs.ext4", "-q", device)
    shared.track(device)
    shared.sync(device, replica)
    wanted = Options(consistency="filesystem")
    with shared.mounted(device) as point:
        for name in ("one", "two"):
            (point / name).write_text(name)
            report = sync.sync(shared.store, device, str(replica), wanted, Silent())[0]
            assert (report.mode, report.consistency) == ("incremental", "filesystem")
            report = sync.sync(shared.store, device, str(replica), wanted, Silent())[0]
            assert report.consistency == "filesystem"
            run("e2fsck", "-f", "-n", replica)
            with shared.mounted(str(replica), "-o", "loop,ro") as seen:
                assert (seen / name).read_text() == name
    link = shared.status(device)["links"][0]
    assert (link["state"], link["reason"]) == ("ready", "")


def test_without_validation_the_order_is_lost(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture.Source, "is_valid", lambda *_: True)
    found = []
    for _ in range(5):
        with shared.fresh() as lab:
            _, _, faults = points(lab, "loop-512", "flat out", 10)
        found += faults
        if found:
            break
    assert found, "50 unvalidated points under full load all kept the order"


def test_the_judge_knows_right_from_wrong() -> None:
    import numpy as np

    image = np.zeros(CHAIN, dtype=np.uint8)
    sectors = image.view(chains._SECTOR).reshape(-1, 8)

    def put(number: int) -> None:
        block = int(chains.places(np.array([number]))[0])
        sectors[block]["magic"], sectors[block]["number"] = chains._MAGIC, number

    assert judge(image, 0, 0).prefix == 0
    for number in range(1, 101):
        put(number)
    assert judge(image, 0, 100) == chains.Verdict(100)
    assert "100 were" not in judge(image, 0, 100).fault
    assert "101 were completed" in judge(image, 0, 101).fault
    put(102)
    assert judge(image, 0, 100).fault, "101 is missing below 102"
    put(101)
    block = int(chains.places(np.array([103]))[0])
    sectors[block]["magic"][3:], sectors[block]["number"][3:] = chains._MAGIC, 103
    assert judge(image, 0, 102) == chains.Verdict(102), "the last one may be torn"
