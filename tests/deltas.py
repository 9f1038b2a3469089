"""Deltas with anything in them, and what may happen to one: for whoever has to refuse them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from tests.second_reader import DATA, END, HEAD, MAGIC, PREAMBLE, xxh64, xxh128

# Their parts, with right checksums.


def preamble(
    header: bytes, *, version: int = 1, flags: int = 0, length: int | None = None
) -> bytes:
    length = len(header) if length is None else length
    raw = struct.pack(PREAMBLE[:-1], MAGIC, version, flags, length, xxh64(header))
    return raw + struct.pack("<Q", xxh64(raw))


def head(
    kind: int,
    start: int = 0,
    length: int = 0,
    payload: bytes = b"",
    *,
    codec: int = 0,
    flags: int = 0,
    stored: int | None = None,
) -> bytes:
    stored = len(payload) if stored is None else stored
    raw = struct.pack(HEAD[:-1], kind, codec, flags, stored, start, length, xxh64(payload))
    return raw + struct.pack("<Q", xxh64(raw))


def frame(kind: int, start: int, length: int, payload: bytes = b"", *, codec: int = 0) -> bytes:
    return head(kind, start, length, payload, codec=codec) + payload


def record(value: object) -> bytes:
    return json.dumps(value).encode()


def opening(header: object) -> bytes:
    raw = header if isinstance(header, bytes) else record(header)
    return preamble(raw) + raw


def ending(trailer: object) -> bytes:
    raw = trailer if isinstance(trailer, bytes) else record(trailer)
    return frame(END, 0, 0, raw)


def closed(stream: bytes) -> bytes:
    """With its digest."""
    return stream + xxh128(stream)


def zstd_rle(length: int, *, declared: int | None = None, window_log: int | None = None) -> bytes:
    """A zstd frame (RFC 8878) of `length` zeroes in blocks of one byte repeated."""
    declared = length if declared is None else declared
    out = bytes.fromhex("28b52ffd")
    if window_log is None:
        out += bytes([0b11100000]) + struct.pack("<Q", declared)  # one segment
    else:
        out += bytes([0b11000000, (window_log - 10) << 3]) + struct.pack("<Q", declared)
    while length > 0:
        piece = min(length, 1 << 17)
        length -= piece
        out += ((piece << 3) | 0b010 | (length == 0)).to_bytes(3, "little") + b"\0"
    return out


# Mutations: each takes a valid stream apart and puts it together wrongly.

EXTREMES = [0, 1, 511, 40, 65535, 65536, 65537, 2**22, 2**22 + 1, 2**31, 2**32 - 1, 2**32]
EXTREMES += [2**63 - 1, 2**63, 2**64 - 1, 2**64 - 4096]


@dataclass
class Parts:
    """A valid stream in pieces: header, frames as (head, payload), trailer."""

    header: bytes
    frames: list[tuple[bytes, bytes]]
    trailer: bytes

    @classmethod
    def of(cls, stream: bytes) -> Parts:
        at = 32 + struct.unpack_from("<I", stream, 12)[0]
        parts = cls(stream[32:at], [], b"")
        while True:
            stored = struct.unpack_from("<I", stream, at + 4)[0]
            pair = stream[at : at + 40], stream[at + 40 : at + 40 + stored]
            if pair[0][0] == END:
                parts.trailer = pair[1]
                return parts
            parts.frames.append(pair)
            at += 40 + stored

    def join(self) -> bytes:
        return closed(self.open() + ending(self.trailer))

    def open(self) -> bytes:
        return opening(self.header) + b"".join(a + b for a, b in self.frames)


def mutate(stream: bytes, other: bytes, rng: random.Random) -> bytes:
    """One of the ways, sometimes two, in which a stream goes wrong."""
    stream = rng.choice(_WAYS)(stream, other, rng)
    return rng.choice(_BLIND)(stream, other, rng) if rng.random() < 0.05 else stream


def _flip(stream: bytes, _: bytes, rng: random.Random) -> bytes:
    out = bytearray(stream)
    for _flips in range(rng.choice([1, 1, 1, 2, 8]) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _splice(stream: bytes, other: bytes, rng: random.Random) -> bytes:
    cut, end = sorted(rng.choices(range(len(stream) + 1), k=2))
    first, last = sorted(rng.choices(range(len(other) + 1), k=2))
    middle = rng.choice([b"", other[first:last], stream[cut:end] * 2, rng.randbytes(end - cut)])
    return stream[:cut] + middle + stream[end:]


def _truncate(stream: bytes, _: bytes, rng: random.Random) -> bytes:
    return stream[: rng.randrange(len(stream) + 1)]


def _append(stream: bytes, other: bytes, rng: random.Random) -> bytes:
    return stream + rng.choice([b"\0", other, rng.randbytes(50)])


def _preamble(stream: bytes, _: bytes, rng: random.Random) -> bytes:
    raw = Parts.of(stream).header
    limit = {"version": 2**16, "flags": 2**16, "length": 2**32}
    name = rng.choice(list(limit))
    value = rng.choice(EXTREMES) % limit[name]
    out = preamble(raw, **{name: value}) + stream[32:]
    return closed(out[:-16]) if rng.random() < 0.8 else out


def _head(stream: bytes, _: bytes, rng: random.Random) -> bytes:
    """Any field of a head replaced by an extreme; the checksums right, mostly."""
    parts = Parts.of(stream)
    if not parts.frames:
        return stream
    index = rng.randrange(len(parts.frames))
    raw, payload = parts.frames[index]
    fields = list(struct.unpack(HEAD, raw))
    which = rng.randrange(8)
    bits = [8, 8, 16, 32, 64, 64, 64, 64][which]
    fields[which] = rng.choice([*EXTREMES, rng.getrandbits(64), fields[which] + 1]) % 2**bits
    if rng.random() < 0.9:
        fields[7] = xxh64(struct.pack(HEAD, *fields)[:32])
    parts.frames[index] = struct.pack(HEAD, *fields), payload
    return parts.join()


def _payload(stream: bytes, other: bytes, rng: random.Random) -> bytes:
    """A damaged payload with right checksums: for the decompressor."""
    parts = Parts.of(stream)
    packed = [index for index, (raw, _) in enumerate(parts.frames) if raw[1]]
    if not packed:
        return _json(stream, other, rng)
    index = rng.choice(packed)
    raw, payload = parts.frames[index]
    _, codec, _, _, start, length, _, _ = struct.unpack(HEAD, raw)
    payload = rng.choice([_flip, _flip, _splice, _truncate])(payload, payload, rng)
    if rng.random() < 0.2:
        payload = zstd_rle(rng.choice([length, 2**20]), declared=rng.choice([length, 2**40]))
    parts.frames[index] = head(DATA, start, length, payload, codec=codec), payload
    return parts.join()


def _order(stream: bytes, _: bytes, rng: random.Random) -> bytes:
    """Frames dropped, repeated, mixed up; the digest right, mostly."""
    parts = Parts.of(stream)
    frames = parts.frames
    if not frames:
        return stream
    match rng.randrange(3):
        case 0:
            frames.pop(rng.randrange(len(frames)))
        case 1:
            frames.insert(rng.randrange(len(frames) + 1), rng.choice(frames))
        case _:
            rng.shuffle(frames)
    return parts.join() if rng.random() < 0.5 else parts.join()[:-16] + stream[-16:]


def _json(stream: bytes, _: bytes, rng: random.Random) -> bytes:
    """A value of the header or the trailer replaced, or its text damaged."""
    parts = Parts.of(stream)
    name = rng.choice(["header", "trailer"])
    raw: bytes = getattr(parts, name)
    if rng.random() < 0.3:
        raw = rng.choice([_flip, _splice, _truncate])(raw, raw, rng)
    else:
        value = json.loads(raw)
        inner = rng.choice([value, *(item for item in value.values() if isinstance(item, dict))])
        key = rng.choice([*inner, "unknown"])
        odd: list[object] = [
            None,
            True,
            -1,
            0.5,
            1e308,
            "",
            "\n",
            "\ud800",
            "x" * 5000,
            [],
            {},
            "none",
            "crash",
        ]
        inner[key] = rng.choice([*odd, *EXTREMES, [[[[]]]], {"a": {"b": 1}}])
        if rng.random() < 0.2:
            del inner[key]
        raw = record(value)
    setattr(parts, name, raw)
    return parts.join()


_BLIND: list[Callable[[bytes, bytes, random.Random], bytes]] = [_flip, _splice, _truncate, _append]
_WAYS = [*_BLIND, _preamble, _head, _head, _payload, _order, _order, _json]
