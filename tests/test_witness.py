"""Databases as witnesses: each point is to them what a power cut of the source would have left.

Points are taken while a database on the source is written; a copy of the replica is mounted, the
database recovers on it, checks itself, and must hold what was acknowledged before the point.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blktrack import capture, sync
from blktrack.errors import NoPoint
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.units import MIB
from tests.blockdev import Lab, Silent, run, told, wait_until
from tests.chains import Log
from tests.ledger import Damaged, Software, judge, writers
from tests.postgres import Postgres
from tests.sqlite import Sqlite

pytestmark = pytest.mark.needs("root", "loop", "bpf")

PATIENCE = 4  # attempts at a point
SIZE = 512 * MIB  # XFS refuses less than 300 MiB
# What points are taken at which pace: transactions per second of each writer, 0 for flat out.
CRASH, FROZEN = "crash", "filesystem"
FEW = {20.0: [CRASH, CRASH], 200.0: [CRASH, FROZEN], 0.0: [CRASH]}
MORE = {20.0: [CRASH, CRASH, CRASH], 200.0: [CRASH, FROZEN], 0.0: [CRASH]}
MANY = {20.0: [CRASH] * 20, 200.0: [CRASH, CRASH, CRASH, FROZEN] * 5, 0.0: [CRASH, FROZEN] * 5}
Plan = Mapping[float, Sequence[str]]
FILE_SYSTEMS = [pytest.param(k, marks=pytest.mark.needs(k)) for k in ("ext4", "xfs")]
SOFTWARE = ["sqlite-wal", "sqlite-delete", "postgres"]
DATABASES = [
    pytest.param(name, marks=pytest.mark.needs(*{name} & {"postgres"})) for name in SOFTWARE
]


def software(name: str, lab: Lab) -> Software:
    if name == "postgres":
        return Postgres(lab)
    return Sqlite(name.removeprefix("sqlite-"))


@dataclass
class Witness:
    """A source with a database that is written, its replica, and the points of it."""

    lab: Lab
    kind: str
    database: Software
    log: Path
    missed: int = 0
    reports: list[SyncReport] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device, self.replica = self.lab.loop(SIZE), str(self.lab.name("replica"))
        run(f"mkfs.{self.kind}", "-q", self.device)
        self.lab.track(self.device)

    def take(self, wanted: str, log: Log) -> None:
        """Bring the replica to a point while transactions go on; it may take another attempt."""
        options = Options(consistency=wanted)
        for _ in range(PATIENCE):
            goal = log.done + 5
            wait_until(lambda goal=goal: bool((log.done >= goal).all()), "more transactions")  # type: ignore[misc]
            try:
                report = sync.sync(self.lab.store, self.device, self.replica, options, Silent())[0]
            except NoPoint:
                self.missed += 1
                continue
            assert report.consistency in (wanted, FROZEN)
            self.reports.append(report)
            return
        pytest.fail(f"no point of {wanted} consistency in {PATIENCE} attempts")

    def examine(self, copy: Path, report: SyncReport, log: Log) -> str:
        """What is wrong with what recovers on a copy of the replica, and with its file system."""
        try:
            uuid = ",nouuid" if self.kind == "xfs" else ""
            with self.lab.mounted(str(copy), "-o", f"loop{uuid}") as folder:
                found = self.database.recover(folder)
            if self.kind == "ext4":
                run("e2fsck", "-f", "-n", copy)
            else:
                run("xfs_repair", "-n", "-f", copy)
        except (Damaged, OSError, subprocess.CalledProcessError) as error:
            return str(error)
        return judge(found, log, report.point)

    def run(self, plan: Plan, seed: int) -> None:
        with self.lab.mounted(self.device) as folder, self.database.serve(folder) as words:
            self.lab.sync(self.device, self.replica)
            for pace, points in plan.items():
                copies = []
                with writers(self.database.module, words, self.log, pace, seed) as log:
                    for wanted in points:
                        self.take(wanted, log)
                        copies.append(self.lab.name("copy"))
                        run("cp", self.replica, copies[-1])  # holes stay holes
                # The writers rest meanwhile: there are two processors.
                for copy, report in zip(copies, self.reports[-len(copies) :], strict=True):
                    if fault := self.examine(copy, report, log):
                        self.faults.append(f"epoch {report.epoch}, {report.consistency}: {fault}")
                    copy.unlink()

    def summary(self) -> str:
        reports = self.reports
        frozen = [report.freeze_s for report in reports if report.freeze_s]
        return (
            f"{len(reports)} points ({self.missed} missed) in "
            f"{sum(report.rounds for report in reports)} rounds, {len(frozen)} of them frozen, for "
            f"at most {max(frozen, default=0):.3f} s"
        )


def witnessed(lab: Lab, kind: str, name: str, plan: Plan, seed: int) -> Witness:
    witness = Witness(lab, kind, software(name, lab), lab.name("log"))
    witness.run(plan, seed)
    return witness


@pytest.mark.parametrize("name", DATABASES)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_database_recovers_from_every_point(shared: Lab, kind: str, name: str, seed: int) -> None:
    plan = FEW if name == "postgres" else MORE
    witness = witnessed(shared, kind, name, plan, seed)
    assert not witness.faults, "\n".join(witness.faults)
    told(f"{name} on {kind}: {witness.summary()}")


@pytest.mark.soak
@pytest.mark.parametrize("name", DATABASES)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_database_recovers_from_each_of_many_points(
    shared: Lab, kind: str, name: str, seed: int
) -> None:
    witness = witnessed(shared, kind, name, MANY, seed)
    assert not witness.faults, "\n".join(witness.faults)
    told(f"{name} on {kind}: {witness.summary()}")


@pytest.mark.needs("ext4")
def test_without_validation_a_database_finds_damage(
    shared: Lab, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(capture.Source, "is_valid", lambda *_: True)
    witness = witnessed(shared, "ext4", "sqlite-wal", {0.0: [CRASH] * 8}, seed)
    assert witness.faults, "8 unvalidated points under full load all recovered"
    told(f"sqlite-wal on ext4: {len(witness.faults)} of 8 unvalidated points were damaged")
