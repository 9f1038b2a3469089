"""Compression at the level of the moment."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
import zstandard

from blktrack.ship.delta import codec
from blktrack.ship.delta.codec import Compressor, Decompressor
from blktrack.ship.delta.format import MAX_FRAME, MAX_WINDOW
from blktrack.ship.wire.pace import FIXED_MOST
from blktrack.units import KIB, MIB

LEVELS = (-50, -10, 1, 6, 12)


def some(seed: int, size: int) -> bytes:
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(4, 40)) for _ in range(200)]
    made = b"".join(rng.choices(words, k=1 + size // 8))
    return (made * 2)[:size]


def test_the_level_may_be_another_each_time(seed: int) -> None:
    data = some(seed, MIB)
    compressor = Compressor(3)
    sizes: dict[int | None, int] = {}
    for level in (*LEVELS, *reversed(LEVELS), None):
        packed = compressor.compress(memoryview(data), level)
        assert packed is not None
        assert Decompressor().decompress(memoryview(packed), len(data), 0) == data
        assert sizes.setdefault(level, len(packed)) == len(packed)
    assert sizes[12] < sizes[1] < sizes[-50]
    assert sizes[None] == len(zstandard.ZstdCompressor(level=3).compress(data))
    with pytest.raises(ValueError, match="no level"):
        Compressor().compress(memoryview(data))


def test_no_level_asks_for_a_larger_window_than_a_receiver_has() -> None:
    data = memoryview(bytes(MAX_FRAME))
    for level in (*LEVELS, FIXED_MOST):
        packed = Compressor().compress(data, level)
        assert packed is not None
        assert zstandard.get_frame_parameters(packed).window_size <= MAX_WINDOW


def test_contexts_are_used_again_and_few_are_kept(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    made: Counter[int] = Counter()
    real = zstandard.ZstdCompressor

    def counted(level: int, write_content_size: bool) -> zstandard.ZstdCompressor:
        made[level] += 1
        return real(level=level, write_content_size=write_content_size)

    monkeypatch.setattr(zstandard, "ZstdCompressor", counted)
    compressor, data = Compressor(), memoryview(some(seed, 4 * KIB))
    for level in (1, 3, 1, 3, 1):
        compressor.compress(data, level)
    assert made == {1: 1, 3: 1}
    for level in range(4, 4 + codec._IDLE):  # those that were not used for longest go
        compressor.compress(data, level)
    compressor.compress(data, 1)
    assert made[1] == 2
    assert len(compressor._idle) == codec._IDLE


def test_threads_at_several_levels(seed: int) -> None:
    compressor = Compressor()
    failed: list[BaseException] = []

    def run(number: int) -> None:
        rng = random.Random(seed + number)
        try:
            for turn in range(60):
                data = some(seed + number * 100 + turn, rng.randrange(1, 64 * KIB))
                packed = compressor.compress(memoryview(data), rng.choice(LEVELS))
                if packed is not None:
                    view = memoryview(packed)
                    assert Decompressor().decompress(view, len(data), 0) == data
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(compressor._idle) <= codec._IDLE
