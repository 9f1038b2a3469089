"""A replica as an operator meets it, wherever it is: on this host, at the end of two pipes, on
another host reached by a real ssh."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from blktrack import sync
from blktrack.options import Options
from blktrack.report import SyncReport
from blktrack.units import KIB, MIB
from tests import sectors
from tests.blockdev import Lab, Silent, read_image, resize, write_direct
from tests.farside import FarSide, every_way
from tests.oracle import fill, repeating

pytestmark = [pytest.mark.needs("root", "loop", "bpf"), every_way]

SIZE = 16 * MIB


def change(device: str, offset: int, length: int = 64 * KIB, number: int = 1) -> None:
    write_direct(device, offset, sectors.make(offset, length, number))


def identical(device: str, replica: str | Path) -> bool:
    return not sectors.faults(read_image(device), read_image(replica))


def synced(lab: Lab, device: str, target: str, **options: bool) -> SyncReport:
    return sync.sync(lab.store, device, target, Options(**options), Silent())[0]  # type: ignore[arg-type]


def state_of(path: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_from_nothing_to_points(shared: Lab, far: FarSide) -> None:
    device, target = shared.loop(SIZE), far.name()
    fill(device)
    shared.track(device)
    first = synced(shared, device, target)
    assert (first.mode, first.bytes_changed) == ("initial", SIZE)
    second = synced(shared, device, target)
    assert (second.mode, second.bytes_shipped, second.rounds) == ("nothing", 0, 0)
    change(device, MIB)
    third = synced(shared, device, target)
    assert (third.mode, third.extents, third.bytes_shipped) == ("incremental", 1, 64 * KIB)
    assert third.consistency == "crash"
    least, most = (0, 1) if far.way == "here" else (4 * KIB, 96 * KIB)
    assert least <= third.bytes_wire < most
    assert identical(device, far.path())
    assert [file.name for file in Path(f"{far.path()}.blktrack").iterdir()] == ["replica.json"]


def test_zeroes_travel_as_extents(shared: Lab, far: FarSide) -> None:
    device, target = shared.loop(64 * MIB), far.name()
    fill(device)
    shared.track(device)
    synced(shared, device, target)
    write_direct(device, 8 * MIB, bytes(48 * MIB))
    done = synced(shared, device, target)
    assert (done.mode, done.bytes_zeroed) == ("incremental", 48 * MIB)
    assert done.bytes_wire < 64 * KIB
    assert identical(device, far.path())


def test_what_others_wrote_is_found_by_digests(shared: Lab, far: FarSide) -> None:
    device, target = shared.loop(64 * MIB), far.name()
    fill(device)
    shared.track(device)
    synced(shared, device, target)
    with far.path().open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"x" * 5000)
    done = shared.blktrack("verify", device, target, "--json")
    assert (done.code, done.json["extents"]) == (5, [[5 * MIB, 8 * KIB]])
    resync = synced(shared, device, target)
    assert (resync.mode, resync.bytes_shipped) == ("resync", 8 * KIB)
    assert "written to by something else" in resync.reason
    assert resync.bytes_wire < 256 * KIB
    assert shared.blktrack("verify", device, target, "--json").json["bytes_different"] == 0
    assert identical(device, far.path())


def test_repair_rewrites_what_differs(shared: Lab, far: FarSide) -> None:
    device, target = shared.loop(SIZE), far.name()
    fill(device)
    shared.track(device)
    synced(shared, device, target)
    with far.path().open("r+b") as file:
        file.seek(4096)
        file.write(b"x")
    done = shared.blktrack("verify", device, target, "--repair", "--json").json
    assert (done["bytes_different"], done["bytes_repaired"]) == (4 * KIB, 4 * KIB)
    assert identical(device, far.path())


def test_a_replica_that_was_rolled_back_is_found_before_anything_is_sent(
    shared: Lab, far: FarSide
) -> None:
    device, target, old = shared.loop(SIZE), far.name(), shared.name("old")
    fill(device)
    shared.track(device)
    synced(shared, device, target)
    shutil.copytree(far.folder, old)
    change(device, MIB)
    synced(shared, device, target)
    shutil.rmtree(far.folder)
    shutil.copytree(old, far.folder)
    change(device, 2 * MIB)
    refused = shared.blktrack("sync", device, target, "--no-resync")
    assert refused.code == 3
    done = synced(shared, device, target)
    assert done.mode == "resync"
    assert identical(device, far.path())


def test_a_replica_of_another_source_is_refused_and_untouched(shared: Lab, far: FarSide) -> None:
    one, other, target = shared.loop(SIZE), shared.loop(SIZE), far.name()
    for device in (one, other):
        fill(device)
        shared.track(device)
    synced(shared, one, target)
    before = state_of(far.folder)
    done = shared.blktrack("sync", other, target)
    assert done.code == 1
    assert f"is a replica of {one}" in done.err
    (far.path("stranger")).write_bytes(b"data of somebody")
    done = shared.blktrack("sync", other, far.name("stranger"))
    assert (done.code, "is a file with data in it" in done.err) == (1, True)
    far.path("stranger").unlink()
    assert state_of(far.folder) == before
    done = shared.blktrack("sync", other, target, "--force", "--json")
    assert done.json["mode"] == "initial"
    assert identical(other, far.path())


def test_the_source_itself_is_no_replica_by_way_of_another_host(shared: Lab, far: FarSide) -> None:
    device = shared.loop(SIZE)
    fill(device)
    shared.track(device)
    done = shared.blktrack("sync", device, far.device(device), "--force")
    assert (done.code, "is the source itself" in done.err) == (1, True)


def test_a_device_as_replica(shared: Lab, far: FarSide) -> None:
    device, replica = shared.loop(SIZE), shared.loop(SIZE, sector=512)
    target = far.device(replica)
    fill(device)
    shared.track(device)
    assert synced(shared, device, target).mode == "initial"
    change(device, MIB, 512)
    done = synced(shared, device, target)
    assert (done.mode, done.bytes_shipped) == ("incremental", 4 * KIB)
    assert identical(device, replica)
    large = shared.loop(SIZE + MIB)
    shared.track(large)
    refused = shared.blktrack("sync", large, target, "--force")
    assert (refused.code, "is too small" in refused.err) == (1, True)


def test_a_source_that_grows(shared: Lab, far: FarSide) -> None:
    file = shared.name("disk")
    device, target = shared.loop(SIZE, file=file), far.name()
    fill(device)
    shared.track(device)
    synced(shared, device, target)
    resize(device, file, SIZE + 4 * MIB)
    change(device, SIZE + MIB)
    done = synced(shared, device, target)
    assert done.mode == "incremental"
    assert far.path().stat().st_size == SIZE + 4 * MIB
    assert identical(device, far.path())


def test_a_point_under_writes(shared: Lab, far: FarSide) -> None:
    device, target = shared.loop(64 * MIB), far.name()
    fill(device)
    shared.track(device)
    with repeating(lambda: change(device, 32 * MIB, 4 * KIB)):
        shared.sync(device, target)
        shared.sync(device, target)
    done = synced(shared, device, target)
    assert (done.mode, done.consistency) == ("incremental", "crash")
    assert identical(device, far.path())


def test_an_increment_in_place(shared: Lab, far: FarSide) -> None:
    device, target = shared.loop(SIZE), far.name()
    fill(device)
    shared.track(device)
    synced(shared, device, target)
    change(device, MIB)
    done = synced(shared, device, target, in_place=True)
    assert (done.mode, done.bytes_shipped) == ("incremental", 64 * KIB)
    assert identical(device, far.path())
