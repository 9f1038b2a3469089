"""The ends of a copy: sources and replicas that fail, are full, are held or lack an operation."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from blktrack import extent, linux
from blktrack.errors import Busy, CopyFailed
from blktrack.extent import from_pairs
from blktrack.ship import worker
from blktrack.ship.copy import Mode, copy
from blktrack.ship.endpoint import DeviceEnd, EndError, FileEnd, open_end
from blktrack.units import KIB, MIB
from tests.copies import content, copy_threads, fill, sparse, whole
from tests.faultfs import FaultFile
from tests.loopdev import Disks


@pytest.mark.needs("root")
def test_full_file_system(disks: Disks) -> None:
    source = disks.name("source")
    source.write_bytes(b"\x22" * 4 * MIB)
    point = disks.attach(None, "tmpfs", "-o", "size=1m")
    replica = sparse(point / "replica", 4 * MIB)
    settled: list[list[int]] = []
    with (
        open_end(str(source)) as one,
        open_end(str(replica), writable=True) as other,
        pytest.raises(EndError) as caught,
    ):
        copy(
            one, other, whole(4 * MIB), chunk=256 * KIB,
            checkpoint=lambda extents: settled.extend(extents.tolist()),
        )  # fmt: skip
    error = caught.value
    assert error.errno == errno.ENOSPC
    assert error.extent is not None and error.extent.length == 256 * KIB
    assert str(error) == f"cannot write {replica} at {error.extent}: No space left on device"
    assert "free space" in error.hint
    assert copy_threads() == []
    for start, length in settled:
        assert replica.read_bytes()[start : start + length] == b"\x22" * length


@pytest.fixture
def faulty(disks: Disks) -> Iterator[tuple[FaultFile, Path]]:
    """A disk of 16 MiB that fails where it is told to, filled with 0x33."""
    fault = disks.held.enter_context(FaultFile(disks.folder, 16 * MIB))
    fault.backing.write_bytes(b"\x33" * 16 * MIB)
    yield fault, disks.loop(file=fault.path)


FAULTS = [(4096, 4096), (5 * MIB + 512, 512), (9 * MIB, 20 * KIB), (16 * MIB - 4096, 4096)]
GRANULES = [[4096, 4096], [5 * MIB, 4096], [9 * MIB, 20 * KIB], [16 * MIB - 4096, 4096]]


@pytest.mark.needs("root", "loop", "fuse")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_unreadable_places_of_the_source(
    disks: Disks, faulty: tuple[FaultFile, Path], mode: Mode, small: bool
) -> None:
    fault, source = faulty
    replica = disks.loop(16 * MIB)
    fault.fail(reads=FAULTS)
    extents = whole(16 * MIB)
    pairs = [(start, 8192) for start in range(0, 16 * MIB, 8192)]
    if small:  # as requests of their own, moved in batches
        extents = np.array(pairs, dtype=np.int64)
    settled: list[list[int]] = []
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        copied = copy(
            one, other, extents, mode=mode, granularity=4096,
            checkpoint=lambda extents: settled.extend(extents.tolist()),
        )  # fmt: skip
    assert copied.failed.tolist() == GRANULES
    bad = sum(length for _, length in GRANULES)
    assert copied.bytes_read == 16 * MIB - bad
    expected = bytearray(b"\x33" * 16 * MIB)
    for start, length in GRANULES:
        expected[start : start + length] = bytes(length)
    if mode is Mode.COMPARE:
        assert extent.total(copied.different) == 16 * MIB - bad
        assert content(replica) == bytes(16 * MIB)
        return
    assert copied.bytes_written == 16 * MIB - bad
    assert content(replica) == expected
    assert sum(length for _, length in settled) == 16 * MIB - bad
    # What failed is all that is left to do once the disk can be read again.
    fault.fail()
    with open_end(str(source)) as one, open_end(str(replica), writable=True) as other:
        assert copy(one, other, copied.failed, mode=mode).failed.tolist() == []
    assert content(replica) == b"\x33" * 16 * MIB


@pytest.mark.needs("root", "loop", "fuse")
def test_a_dead_source_is_not_searched_for_ever(
    disks: Disks, faulty: tuple[FaultFile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, source = faulty
    monkeypatch.setattr(worker, "_GIVE_UP", 10)
    fault.fail(reads=[(0, 16 * MIB)])
    with open_end(str(source)) as one, open_end(str(disks.loop(16 * MIB)), writable=True) as other:
        copied = copy(one, other, whole(16 * MIB))
    assert copied.failed.tolist() == [[0, 16 * MIB]]
    assert copied.bytes_read == 0


@pytest.mark.needs("root", "loop", "fuse")
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_replica_that_cannot_be_written(
    disks: Disks, faulty: tuple[FaultFile, Path], small: bool
) -> None:
    fault, replica = faulty
    fault.fail(writes=[(7 * MIB + 4096, 4096)])
    source = disks.loop(16 * MIB)
    fill(source, b"\x44" * 16 * MIB)
    extents = whole(16 * MIB)
    if small:
        extents = from_pairs([(start, 4096) for start in range(4096, 16 * MIB, 8192)])
    settled: list[list[int]] = []
    with (
        open_end(str(source)) as one,
        open_end(str(replica), writable=True) as other,
        pytest.raises(EndError, match="Input/output error") as caught,
    ):
        copy(one, other, extents, checkpoint=lambda extents: settled.extend(extents.tolist()))
    assert caught.value.path == str(replica)
    place = caught.value.extent
    assert place is not None and place.start <= 7 * MIB + 4096 < place.end
    for start, length in settled:
        assert not (start < 7 * MIB + 8192 and start + length > 7 * MIB + 4096)
        assert fault.backing.read_bytes()[start : start + length] == b"\x44" * length


def test_source_that_shrank(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * MIB)
    replica = sparse(tmp_path / "replica", 2 * MIB)
    with (
        open_end(str(tmp_path / "source")) as one,
        open_end(str(replica), writable=True) as other,
        pytest.raises(CopyFailed, match=r"cannot read .*source at .*: No such device"),
    ):
        copy(one, other, whole(2 * MIB))
    assert copy_threads() == []


@pytest.mark.needs("root", "loop")
def test_a_replica_device_is_claimed(disks: Disks) -> None:
    device = str(disks.loop(MIB, sector=4096))
    with DeviceEnd(device, writable=True) as end:
        with pytest.raises(EndError, match="Device or resource busy"):
            DeviceEnd(device, writable=True)
        DeviceEnd(device).close()
        assert (end.size, end.align) == (MIB, 4096)
        with pytest.raises(ValueError, match="blocks of 4096"):
            end.write(memoryview(bytes(512)), 0)
        end.write(linux.Buffer(4096).view, MIB - 4096)
        with pytest.raises(EndError, match=r"at 1048576\+4096: No space left"):
            end.write(linux.Buffer(4096).view, MIB)
        end.flush()
        assert end.read(MIB - 100, 100) == bytes(100)


def test_a_replica_file_is_locked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    one, other = FileEnd(str(path)), FileEnd(str(path))
    with one, other, pytest.raises(Busy, match="held by another run"):
        FileEnd(str(path), writable=True)
    with FileEnd(str(path), writable=True) as end, path.open() as file:
        with pytest.raises(Busy, match="held by another run"):
            FileEnd(str(path))
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert end.read(4990, 10) == b"x" * 10
        end.zero(1, 4998)
        assert path.read_bytes() == b"x" + bytes(4998) + b"x"
        end.resize(9000)
        assert (end.size, path.stat().st_size) == (9000, 9000)
    with pytest.raises(EndError, match="No such file"):
        open_end(str(tmp_path / "absent"))


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize("kind", ["file", "device"])
def test_zeroing_falls_back_to_writing(
    disks: Disks, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def cannot(name: str) -> Callable[[int, int, int], None]:
        def fail(fd: int, start: int, length: int) -> None:
            tried.append(name)
            raise OSError(errno.EOPNOTSUPP, "not here")

        return fail

    monkeypatch.setattr(linux, "punch_hole", cannot("punch"))
    monkeypatch.setattr(linux, "zero_out", cannot("zero"))
    path = disks.loop(4 * MIB) if kind == "device" else sparse(disks.name("file"), 4 * MIB)
    fill(path, b"\xff" * 4 * MIB)
    with open_end(str(path), writable=True) as end:
        end.zero(MIB - 512, 2 * MIB + 1024)
        end.zero(0, 512)
        end.flush()
    assert tried == (["punch", "zero"] if kind == "device" else ["punch"]), "remembered"
    expected = bytearray(b"\xff" * 4 * MIB)
    expected[MIB - 512 : 3 * MIB + 512] = bytes(2 * MIB + 1024)
    expected[:512] = bytes(512)
    assert content(path) == expected
