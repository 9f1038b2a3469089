"""The raw calls do what their names say, on real devices and files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from blktrack import linux
from blktrack.ship import aio
from blktrack.units import KIB, MIB
from tests.loopdev import Disks, run


def test_numbers_are_the_kernels() -> None:
    # As linux/fs.h gives them on the machines with the common encoding.
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("another encoding of ioctl numbers")
    assert linux.BLKGETSIZE64 == 0x80081272
    assert linux.BLKSSZGET == 0x1268
    assert linux.BLKROGET == 0x125E
    assert linux.BLKFLSBUF == 0x1261
    assert linux.BLKDISCARD == 0x1277
    assert linux.BLKZEROOUT == 0x127F
    assert linux.FICLONERANGE == 0x4020940D
    assert linux.FIFREEZE == 0xC0045877
    assert linux.FITHAW == 0xC0045878


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize("sector", [512, 4096])
def test_device_facts(disks: Disks, sector: int) -> None:
    device = disks.loop(4096 * 251, sector=sector)
    fd = os.open(device, os.O_RDWR)
    try:
        assert linux.device_size(fd) == 4096 * 251
        assert linux.block_size(fd) == sector
        assert not linux.read_only(fd)
        run("blockdev", "--setro", device)
        assert linux.read_only(fd)
        run("blockdev", "--setrw", device)
    finally:
        os.close(fd)


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize("way", [linux.zero_out, linux.punch_hole, linux.discard])
def test_zeroing_a_device(disks: Disks, way: object) -> None:
    device = disks.loop(MIB)
    device.write_bytes(b"\xa5" * MIB)
    fd = os.open(device, os.O_RDWR)
    try:
        os.fsync(fd)
        assert callable(way)
        way(fd, 4096, 8192)
        os.fsync(fd)
        linux.flush_buffers(fd)
    finally:
        os.close(fd)
    assert device.read_bytes() == b"\xa5" * 4096 + bytes(8192) + b"\xa5" * (MIB - 12288)


def test_holes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(b"x" * MIB)
    fd = os.open(path, os.O_RDWR)
    try:
        linux.punch_hole(fd, 64 * KIB, 512 * KIB)
        assert list(linux.data_extents(fd)) == [(0, 64 * KIB), (576 * KIB, 448 * KIB)]
        os.ftruncate(fd, 0)
        os.ftruncate(fd, MIB)
        assert list(linux.data_extents(fd)) == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            linux.punch_hole(-1, 0, 1)
    finally:
        os.close(fd)


@pytest.mark.needs("root", "loop", "ext4")
@pytest.mark.parametrize("sector", [512, 4096])
def test_direct_align(disks: Disks, sector: int) -> None:
    point = disks.mount(disks.loop(32 * MIB, sector=sector), "ext4")
    fd = os.open(point / "file", os.O_RDWR | os.O_CREAT)
    try:
        align = linux.direct_align(fd)
    finally:
        os.close(fd)
    assert align is None or align >= sector


@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 4096, 65537])
def test_is_zero_sees_every_byte(size: int) -> None:
    data = bytearray(size)
    assert linux.is_zero(memoryview(data))
    for place in {0, size // 2, size - 1}:
        data[place] = 1
        assert not linux.is_zero(memoryview(data))
        assert not linux.equal(bytes(size), memoryview(data))
        data[place] = 0
    assert linux.equal(bytes(size), memoryview(data))
    assert not linux.equal(bytes(size), bytes(size + 1))
    assert linux.is_zero(b"")


def test_buffer_knows_its_bounds() -> None:
    buffer, other = linux.Buffer(5000), linux.Buffer(8192)
    assert buffer.size == 8192
    assert buffer.address % linux.PAGE == 0
    buffer.view[8191] = 1
    assert buffer.is_zero(0, 8191)
    assert buffer.is_zero(8192, 0)
    assert not buffer.is_zero(0, 8192)
    assert buffer.equal(0, 8191, other, 1)
    assert not buffer.equal(0, 8192, other, 0)
    for start, length in [(-1, 1), (0, -1), (0, 8193), (8192, 1)]:
        with pytest.raises(ValueError, match="outside a buffer"):
            buffer.is_zero(start, length)
        with pytest.raises(ValueError, match="outside a buffer"):
            buffer.equal(0, 0, other, 9000)


@pytest.mark.needs("root", "loop")
def test_requests_move_what_they_say(disks: Disks) -> None:
    device = disks.loop(MIB)
    buffer, back = linux.Buffer(64 * KIB), linux.Buffer(64 * KIB)
    buffer.array[:] = np.random.default_rng(1).integers(0, 256, 64 * KIB, dtype=np.uint8)
    rows = np.array([[i * 8192, 4096, i * 4096] for i in range(16)], dtype=np.int64)
    queue = aio.RequestQueue(16)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        assert queue.move(fd, buffer, rows, write=True).tolist() == [4096] * 16
        assert queue.move(fd, back, rows[::-1].copy(), write=False).tolist() == [4096] * 16
        assert buffer.equal(0, 64 * KIB, back, 0)
        back.array[:] = 0
        many = np.array([[i // 4 * 8192 + i % 4 * 1024, 1024, i * 1024] for i in range(64)])
        assert queue.move(fd, back, many, write=False).tolist() == [1024] * 64
        assert buffer.equal(0, 64 * KIB, back, 0)
        assert queue.move(fd, back, rows[:0], write=False).tolist() == []
        # The end of the device, then beyond it, then misaligned: each row has its own result.
        edge = np.array([[MIB - 4096, 8192, 0], [2 * MIB, 4096, 8192], [1, 512, 0]], dtype=np.int64)
        assert queue.move(fd, back, edge, write=False).tolist() == [4096, 0, -22]
        with pytest.raises(ValueError, match="outside the buffer"):
            queue.move(fd, back, np.array([[0, 4096, 64 * KIB]], dtype=np.int64), write=False)
        assert queue.move(9999, back, rows, write=False).tolist() == [0] * 16
    finally:
        os.close(fd)
        queue.close()
