"""A second reader of deltas, written from docs/delta-format.md alone."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import xxhash
import zstandard

MAGIC = bytes.fromhex("89424c4b440d0a1a")
PREAMBLE = "<8sHHIQQ"
HEAD = "<BBHIQQQQ"
DATA, ZERO, DISCARD, END = 1, 2, 3, 255

FOREIGN, TRUNCATED, DAMAGED = "foreign", "truncated", "damaged"
NEWER, INVALID = "newer", "invalid"


class Refusal(Exception):
    """The word is one of the table "What must be refused"."""

    def __init__(self, word: str, why: str = "") -> None:
        super().__init__(f"{word}: {why}")
        self.word = word


def xxh64(data: bytes) -> int:
    return xxhash.xxh3_64(data).intdigest()


def xxh128(data: bytes) -> bytes:
    return xxhash.xxh3_128(data).digest()


@dataclass
class Plain:
    """A delta as the second reader found it."""

    header: dict[str, Any]
    frames: list[tuple[int, int, bytes | int]] = field(default_factory=list)  # kind, start, content
    trailer: dict[str, Any] = field(default_factory=dict)
    length: int = 0  # of the stream up to the end of the digest

    def apply(self, image: bytearray) -> None:
        for _, start, content in self.frames:
            data = bytes(content) if isinstance(content, int) else content
            image[start : start + len(data)] = data


def parse(stream: bytes) -> Plain:
    """Read it all; Refusal if the page says so."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if len(stream) - at < count:
            raise Refusal(TRUNCATED, f"at {at}")
        at += count
        return stream[at - count : at]

    if stream[:8] != MAGIC[: len(stream)]:
        raise Refusal(FOREIGN)
    plain = Plain(_header(take))
    size: int = plain.header["source"]["size"]
    counts = dict.fromkeys(("frames", *_KIND_COUNTS.values(), "stored_bytes"), 0)
    while True:
        raw = take(40)
        kind, codec, flags, stored, start, length, payload_sum, own_sum = struct.unpack(HEAD, raw)
        if own_sum != xxh64(raw[:32]):
            raise Refusal(DAMAGED, "head")
        if kind not in (DATA, ZERO, DISCARD, END) or codec > 1 or flags:
            raise Refusal(NEWER, "kind, codec or flags")
        _check(_within_limits(kind, codec, stored, length))
        _check(kind == END or start + length <= size)
        _check(kind != END or start == 0)
        payload = take(stored)
        if payload_sum != xxh64(payload):
            raise Refusal(DAMAGED, "payload")
        if kind == END:
            break
        content = payload if kind == DATA else length
        if codec == 1:
            content = _unpack(payload, length)
        plain.frames.append((kind, start, content))
        counts["frames"] += 1
        counts["stored_bytes"] += stored
        counts[_KIND_COUNTS[kind]] += length
    digest = xxh128(stream[:at])
    if take(16) != digest:
        raise Refusal(DAMAGED, "digest")
    plain.trailer = _object(payload)
    _point(plain.trailer.get("point"))
    _integer(plain.trailer.get("rounds"))
    _check(isinstance(plain.trailer.get("counts"), dict))
    for name, count in counts.items():
        _integer(plain.trailer["counts"].get(name))
        _check(plain.trailer["counts"][name] == count)
    plain.length = at
    return plain


def _header(take: Callable[[int], bytes]) -> dict[str, Any]:
    raw = take(32)
    _, version, flags, length, header_sum, own_sum = struct.unpack(PREAMBLE, raw)
    if own_sum != xxh64(raw[:24]):
        raise Refusal(DAMAGED, "preamble")
    if version != 1 or flags:
        raise Refusal(NEWER, "version or flags")
    _check(1 <= length <= 65536)
    raw = take(length)
    if header_sum != xxh64(raw):
        raise Refusal(DAMAGED, "header")
    header = _object(raw)
    _check_header(header)
    return header


_KIND_COUNTS = {DATA: "data_bytes", ZERO: "zero_bytes", DISCARD: "discard_bytes"}


def _within_limits(kind: int, codec: int, stored: int, length: int) -> bool:
    if kind == END:
        return codec == length == 0 and 1 <= stored <= 65536
    if kind != DATA:
        return stored == codec == 0 and length >= 1
    return 1 <= length <= 4194304 and (0 < stored < length if codec else stored == length)


def _unpack(payload: bytes, length: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(payload)
        _check(frame.content_size == length and frame.window_size <= 8388608 and not frame.dict_id)
        stream = zstandard.ZstdDecompressor().decompressobj()
        content = stream.decompress(payload)
    except zstandard.ZstdError as error:
        raise Refusal(INVALID, "zstd") from error
    _check(stream.eof and not stream.unused_data and len(content) == length)
    return content


def _check(holds: bool) -> None:
    if not holds:
        raise Refusal(INVALID)


def _object(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check(len({key for key, _ in pairs}) == len(pairs))
        return dict(pairs)

    def constant(_: str) -> None:
        raise Refusal(INVALID)

    try:
        value = json.loads(str(raw, "utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(INVALID, "JSON") from error
    _check(isinstance(value, dict))
    found: dict[str, Any] = value
    return found


def _integer(value: object, low: int = 0) -> int:
    _check(isinstance(value, int) and not isinstance(value, bool))
    assert isinstance(value, int)
    _check(low <= value < 2**63)
    return value


def _text(value: object) -> str:
    _check(isinstance(value, str))
    assert isinstance(value, str)
    codes = [ord(char) for char in value]
    _check(len(codes) <= 4096)
    _check(not any(c < 32 or 127 <= c < 160 or 0xD800 <= c < 0xE000 for c in codes))
    return value


def _time(value: object) -> None:
    _check(isinstance(value, int | float) and not isinstance(value, bool))
    assert isinstance(value, int | float)
    _check(not math.isnan(value) and 0 <= value <= 253402300799)


def _point(value: object) -> None:
    _check(isinstance(value, dict))
    assert isinstance(value, dict)
    if _text(value.get("consistency")) not in ("none", "crash", "filesystem"):
        raise Refusal(NEWER, "consistency")
    _integer(value.get("epoch"))
    _text(value.get("generation"))
    _time(value.get("time"))


def _check_header(header: dict[str, Any]) -> None:
    source = header.get("source")
    _check(isinstance(source, dict))
    assert isinstance(source, dict)
    for key in ("device", "name", "generation"):
        _text(source.get(key))
    _integer(source.get("size"), 1)
    link = _text(header.get("link"))
    _check(
        re.fullmatch("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", link)
        is not None
    )
    granularity = _integer(header.get("granularity"), 512)
    _check(granularity.bit_count() == 1)
    _check("base" in header)
    if header["base"] is not None:
        _point(header["base"])
    _time(header.get("time"))
