"""Mutated deltas: the reader and the second reader come to the same end, and to no other."""

from __future__ import annotations

import io
import random

import pytest

from blktrack.ship.delta import DeltaError, DeltaReader
from tests import deltas, second_reader
from tests.delta_examples import WORDS, Operation, Trickle, frames_of, perform, written
from tests.second_reader import DATA, DISCARD, INVALID, NEWER, ZERO

BASES = 40  # valid streams that mutations begin from
REST = b"and something else"


def valid_stream(rng: random.Random) -> bytes:
    size = rng.choice([1, 4096, 20000, 1 << 20, 2**58])
    operations: list[Operation] = []
    for _ in range(rng.choice([0, 1, 2, 5, 12])):
        start = rng.choice([0, size - 1, rng.randrange(size)])
        content = rng.randbytes(rng.choice([1, 7, 512])) * rng.choice([1, 1, 40])
        kind = rng.choice([DATA, DATA, ZERO, DISCARD])
        operations.append((kind, start, content if kind == DATA else rng.randint(1, size)))
    return written(perform(operations, size), size=size, level=rng.choice([None, 1]))


def verdict(stream: bytes) -> tuple[DeltaError | None, list[tuple[int, int, bytes | int]]]:
    """Why the reader refuses, None if it accepts, with the frames that it gave out until then."""
    frames = []
    source = io.BytesIO(stream) if len(stream) % 3 else Trickle(stream, 97)
    try:
        reader = DeltaReader(source)
        for frame in frames_of(reader):  # it looks that they lie within the size
            frames.append(frame)
    except DeltaError as error:
        return error, frames
    assert reader.trailer.rounds >= 0
    end = reader.offset
    assert second_reader.xxh128(stream[: end - 16]) == stream[end - 16 : end]
    assert source.read() == stream[end:]
    return None, frames


def check(stream: bytes) -> str:
    error, frames = verdict(stream)
    word = WORDS[type(error)] if error else ""
    assert len(frames) <= len(stream) // 40
    try:
        plain = second_reader.parse(stream)
    except second_reader.Refusal as refusal:
        if "consistency" in f"{error} {refusal}":  # in which order JSON is checked is free
            assert {word, refusal.word} <= {NEWER, INVALID}, refusal
        else:
            assert word == refusal.word, refusal
    else:
        assert word == ""
        assert plain.frames == frames
    return word


def campaign(seed: int, count: int) -> None:
    rng = random.Random(seed)
    bases = [valid_stream(rng) for _ in range(BASES)]
    for stream in bases:
        assert check(stream) == ""
        assert check(stream + REST) == ""
    words = dict.fromkeys(["", *WORDS.values()], 0)
    for index in range(count):
        stream = deltas.mutate(rng.choice(bases), rng.choice(bases), rng)
        try:
            words[check(stream)] += 1
        except BaseException as error:
            error.add_note(f"BLKTRACK_SEED={seed}, mutation {index}: {stream[:3000].hex()}")
            raise
    print(f"BLKTRACK_SEED={seed}: {count} streams:", words)
    assert all(words.values()), words


def test_mutated_streams(seed: int) -> None:
    campaign(seed, 10_000)


@pytest.mark.soak
def test_many_mutated_streams(seed: int) -> None:
    for turn in range(50):
        campaign(seed + turn, 10_000)
