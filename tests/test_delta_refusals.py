"""What is no delta, and not quite one: each is refused with its message, at no cost of memory."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from blktrack.ship.delta import (
    MAX_FRAME,
    DeltaDamaged,
    DeltaError,
    DeltaForeign,
    DeltaInvalid,
    DeltaNewer,
    DeltaReader,
    DeltaTruncated,
)
from blktrack.units import MIB
from tests import deltas, second_reader
from tests.delta_examples import HEADER, POINT, ROOT, WORDS, written
from tests.second_reader import DATA, DISCARD, ZERO


def refusal(stream: bytes) -> DeltaError:
    """Why the reader refuses it. Keeps no traceback, and so no buffer of the reader, alive."""
    try:
        for _ in DeltaReader(io.BytesIO(stream)):
            pass
    except DeltaError as error:
        assert error.exit_code == 1
        assert error.hint
        return error.with_traceback(None)
    raise AssertionError("it was accepted")


STREAM = written()
PARTS = deltas.Parts.of(STREAM)
OPENING = deltas.opening(PARTS.header)
ENDING = deltas.ending(PARTS.trailer)
DOCUMENT: dict[str, Any] = second_reader.parse(STREAM).header
TRAILER: dict[str, Any] = second_reader.parse(STREAM).trailer
EMPTY = {**TRAILER, "counts": dict.fromkeys(TRAILER["counts"], 0)}


def with_frame(raw: bytes) -> bytes:
    return deltas.closed(OPENING + raw + ENDING)


def with_header(**changes: object) -> bytes:
    return deltas.closed(deltas.opening({**DOCUMENT, **changes}) + deltas.ending(EMPTY))


def with_source(**changes: object) -> bytes:
    return with_header(source={**DOCUMENT["source"], **changes})


def with_trailer(**changes: object) -> bytes:
    return deltas.closed(OPENING + deltas.ending({**EMPTY, **changes}))


def with_point(**changes: object) -> bytes:
    return with_trailer(point={**TRAILER["point"], **changes})


def with_zstd(payload: bytes, length: int = 1000) -> bytes:
    return with_frame(deltas.frame(DATA, 0, length, payload, codec=1))


def flipped(at: int) -> bytes:
    out = bytearray(STREAM)
    out[at] ^= 1
    return bytes(out)


FRAME = len(OPENING)
LARGE = deltas.opening({**DOCUMENT, "source": {**DOCUMENT["source"], "size": 2**40}})
NESTED = b'{"a":' + b"[" * 60000
REFUSALS: list[tuple[bytes, type[DeltaError], str]] = [
    (b"PK\3\4" + bytes(100), DeltaForeign, "not a delta: it begins with 50 4b 03 04 00 00 00 00"),
    (b"\x89B?", DeltaForeign, "not a delta: it begins with 89 42 3f"),
    (STREAM.replace(b"\r\n", b"\n"), DeltaForeign, "not a delta"),
    (b"", DeltaTruncated, "the delta is empty"),
    (STREAM[:3], DeltaTruncated, "ends after 3 bytes, within its preamble"),
    (STREAM[:31], DeltaTruncated, "ends after 31 bytes, within its preamble"),
    (STREAM[: FRAME - 1], DeltaTruncated, "within its header"),
    (STREAM[:FRAME], DeltaTruncated, "within a frame's head"),
    (STREAM[: FRAME + 47], DeltaTruncated, f"after {FRAME + 47} bytes, within a frame's data"),
    (STREAM[:-17], DeltaTruncated, "within its trailer"),
    (STREAM[:-1], DeltaTruncated, "within its digest"),
    (flipped(8), DeltaDamaged, "its preamble does not match its checksum"),
    (flipped(40), DeltaDamaged, "its header does not match its checksum"),
    (flipped(FRAME), DeltaDamaged, f"frame head at byte {FRAME} does not match its checksum"),
    (flipped(FRAME + 40), DeltaDamaged, f"payload at byte {FRAME + 40} does not match"),
    (flipped(len(STREAM) - 30), DeltaDamaged, "payload at byte .* does not match its checksum"),
    (flipped(len(STREAM) - 1), DeltaDamaged, "digest does not hold: frames were lost"),
    (
        deltas.preamble(PARTS.header, version=2) + STREAM[32:],
        DeltaNewer,
        "newer blktrack: it has format version 2, and this blktrack reads version 1",
    ),
    (deltas.preamble(PARTS.header, flags=4) + STREAM[32:], DeltaNewer, "flags 0x0004 in its prea"),
    (deltas.preamble(b""), DeltaInvalid, "its header has 0 bytes, and 1 to 65536 are allowed"),
    (deltas.preamble(b"", length=2**32 - 1), DeltaInvalid, "its header has 4294967295 bytes"),
    (with_frame(deltas.head(4, 0, 1)), DeltaNewer, f"a frame of kind 4 at byte {FRAME}"),
    (with_frame(deltas.head(0, 0, 1)), DeltaNewer, "a frame of kind 0"),
    (with_frame(deltas.head(DATA, 0, 1, b"x", codec=2)), DeltaNewer, "a frame of codec 2"),
    (with_frame(deltas.head(ZERO, 0, 1, flags=1)), DeltaNewer, "flags 0x0001 in the frame at by"),
    (with_frame(deltas.head(ZERO, 5, 0)), DeltaInvalid, f"byte {FRAME} has an empty extent"),
    (
        with_frame(deltas.head(ZERO, 19999, 2)),
        DeltaInvalid,
        r"has the extent 19999\+2, and the source has 20000 bytes",
    ),
    (with_frame(deltas.head(ZERO, 2**64 - 1, 2)), DeltaInvalid, "has the extent 184467440737095"),
    (with_frame(deltas.head(ZERO, 0, 1, b"x")), DeltaInvalid, "has no data, and a payload or a co"),
    (with_frame(deltas.head(DISCARD, 0, 1, codec=1)), DeltaInvalid, "has no data, and a payload"),
    (with_frame(deltas.head(DATA, 0, 2, b"x")), DeltaInvalid, "has 1 bytes for an extent of 2"),
    (with_frame(deltas.head(DATA, 0, 9, b"", codec=1)), DeltaInvalid, "compressed from 9 to 0 by"),
    (with_frame(deltas.head(DATA, 0, 1, b"x", codec=1)), DeltaInvalid, "compressed from 1 to 1 by"),
    (with_frame(deltas.head(255, 0, 1, b"{}")), DeltaInvalid, "is a trailer and has an extent"),
    (with_frame(deltas.head(255, 0, 0, b"{}", codec=1)), DeltaInvalid, "an extent or a codec"),
    (with_frame(deltas.head(255)), DeltaInvalid, "is a trailer of 0 bytes"),
    (
        LARGE + deltas.frame(DATA, 0, MAX_FRAME + 1, bytes(MAX_FRAME + 1)),
        DeltaInvalid,
        "has data for 4194305 bytes, and 4194304 are allowed",
    ),
    (
        LARGE + deltas.frame(DATA, 0, MAX_FRAME + 1, deltas.zstd_rle(MAX_FRAME + 1), codec=1),
        DeltaInvalid,
        "has data for 4194305 bytes",
    ),
    (
        with_frame(deltas.head(255, stored=2**32 - 1)),
        DeltaInvalid,
        "is a trailer of 4294967295 bytes, and 1 to 65536 are allowed",
    ),
    (with_frame(deltas.head(DATA, 0, 1, b"x") + b"y"), DeltaDamaged, "payload at byte"),
    (with_zstd(b"not zstd"), DeltaInvalid, "cannot be decompressed"),
    (with_zstd(deltas.zstd_rle(1000, declared=2**40)), DeltaInvalid, "declares 1000 bytes"),
    (with_zstd(deltas.zstd_rle(999)), DeltaInvalid, "declares 1000 bytes"),
    (with_zstd(deltas.zstd_rle(10**9, declared=1000)[:900]), DeltaInvalid, "be decompressed"),
    (with_zstd(deltas.zstd_rle(500, declared=1000)), DeltaInvalid, "cannot be decompressed"),
    (with_zstd(deltas.zstd_rle(1000, window_log=30)), DeltaInvalid, "a window of 8388608 at most"),
    (with_zstd(deltas.zstd_rle(1000) + b"x"), DeltaInvalid, "cannot be decompressed"),
    (with_zstd(deltas.zstd_rle(1000)[:-1]), DeltaInvalid, "cannot be decompressed"),
    (with_zstd(bytes.fromhex("28b52ffd 61 05 e802 43 1f 00 00")), DeltaInvalid, "be decompressed"),
    (with_zstd(b"\x50\x2a\x4d\x18\x04\0\0\0abcd"), DeltaInvalid, "payload"),
    (deltas.closed(deltas.opening(b"[]") + ENDING), DeltaInvalid, "header is not a JSON object"),
    (deltas.closed(deltas.opening(NESTED) + ENDING), DeltaInvalid, "header is not a JSON object"),
    (deltas.closed(deltas.opening(b"\xff") + ENDING), DeltaInvalid, "not a JSON object in UTF-8"),
    (
        deltas.closed(deltas.opening(str(PARTS.header, "utf-8").encode("utf-16")) + ENDING),
        DeltaInvalid,
        "not a JSON object in UTF-8",
    ),
    (
        deltas.closed(deltas.opening(PARTS.header[:-1] + b',"link":"x"}') + ENDING),
        DeltaInvalid,
        "with unique keys",
    ),
    (deltas.closed(deltas.opening({"x": 9}) + ENDING), DeltaInvalid, "header has no 'source'"),
    (with_header(source=[]), DeltaInvalid, "its header has a bad 'source'"),
    (with_source(size=0), DeltaInvalid, "its header's source has a bad 'size'"),
    (with_source(size=True), DeltaInvalid, "bad 'size'"),
    (with_source(size=1.0), DeltaInvalid, "bad 'size'"),
    (with_source(size=2**63), DeltaInvalid, "bad 'size'"),
    (with_source(device="\x1b[2J"), DeltaInvalid, "bad 'device'"),
    (with_source(device="\udcff"), DeltaInvalid, "bad 'device'"),
    (with_source(name="x" * 4097), DeltaInvalid, "bad 'name'"),
    (with_source(generation=None), DeltaInvalid, "bad 'generation'"),
    (with_header(link="0F8FAD5B-D9CB-469F-A165-70867728950E"), DeltaInvalid, "bad 'link'"),
    (with_header(link="../../../etc/passwd"), DeltaInvalid, "bad 'link'"),
    (with_header(granularity=4097), DeltaInvalid, "bad 'granularity'"),
    (with_header(granularity=256), DeltaInvalid, "bad 'granularity'"),
    (with_header(base=7), DeltaInvalid, "bad 'base'"),
    (with_header(time=float("nan")), DeltaInvalid, "not a JSON object"),
    (
        deltas.closed(deltas.opening(PARTS.header.replace(b"1767225660.25", b"1e999")) + ENDING),
        DeltaInvalid,
        "bad 'time'",
    ),
    (with_header(time="now"), DeltaInvalid, "bad 'time'"),
    (with_header(time=10**20), DeltaInvalid, "bad 'time'"),
    (with_header(base={**DOCUMENT["base"], "consistency": "x"}), DeltaNewer, "consistency 'x'"),
    (with_point(consistency="quantum"), DeltaNewer, "a point of consistency 'quantum'"),
    (with_point(epoch=-1), DeltaInvalid, "its trailer's point has a bad 'epoch'"),
    (with_trailer(rounds=None), DeltaInvalid, "its trailer has a bad 'rounds'"),
    (with_trailer(counts={}), DeltaInvalid, "its trailer's counts has no 'frames'"),
    (with_trailer(counts=TRAILER["counts"]), DeltaInvalid, "trailer counts Counts.frames=4"),
    (deltas.closed(OPENING + deltas.ending(b"null")), DeltaInvalid, "trailer is not a JSON obj"),
]


@pytest.mark.parametrize(
    ("stream", "kind", "message"), REFUSALS, ids=[message for _, _, message in REFUSALS]
)
def test_refusal(stream: bytes, kind: type[DeltaError], message: str) -> None:
    error = refusal(stream)
    assert re.search(message, str(error)), str(error)
    assert type(error) is kind
    with pytest.raises(second_reader.Refusal) as caught:
        second_reader.parse(stream)
    assert caught.value.word == WORDS[kind]


def test_no_prefix_is_a_delta() -> None:
    for end in range(len(STREAM)):
        assert type(refusal(STREAM[:end])) is DeltaTruncated


def test_no_byte_may_change() -> None:
    for at in range(len(STREAM)):
        assert type(refusal(flipped(at))) in (DeltaForeign, DeltaDamaged)


def test_frames_lost_repeated_or_mixed_up() -> None:
    for frames in (PARTS.frames[1:], PARTS.frames + PARTS.frames[:1], PARTS.frames[::-1]):
        stream = replace(PARTS, frames=frames).open() + ENDING
        assert type(refusal(stream + STREAM[-16:])) is DeltaDamaged
    assert type(refusal(replace(PARTS, frames=PARTS.frames[1:]).join())) is DeltaInvalid


def test_keys_that_are_not_known_are_ignored() -> None:
    more = {"later": [1, {"x": None}]}
    source = {**DOCUMENT["source"], **more}
    header = {**DOCUMENT, **more, "source": source, "base": {**DOCUMENT["base"], **more}}
    trailer = {**EMPTY, **more, "counts": {**EMPTY["counts"], **more}}
    stream = deltas.closed(deltas.opening(header) + deltas.ending(trailer))
    reader = DeltaReader(io.BytesIO(stream))
    assert list(reader) == []
    assert reader.header == HEADER
    assert reader.trailer.point == POINT


# Memory.

BOUND = 48 * MIB  # of address space, above what an idle process has; numpy and threads take some

CHILD = f"""
import gc, io, itertools, random, resource, sys
from tests import deltas, second_reader
from tests.delta_examples import *
from tests.test_delta_refusals import *

def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

refusal(with_zstd(deltas.zstd_rle(999)))  # everything is imported
gc.collect()
gc.disable()  # a refused reader must go without it
resource.setrlimit(resource.RLIMIT_AS, (used() + {BOUND}, resource.RLIM_INFINITY))
try:
    bytearray({2 * BOUND})
except MemoryError:
    pass
else:
    sys.exit("there is no bound")
"""


def in_little_memory(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_lengths_that_lie_cost_no_memory() -> None:
    in_little_memory(
        """
for stream, kind, _ in REFUSALS:
    assert type(refusal(stream)) is kind
for extreme in deltas.EXTREMES:
    for start, length, stored, codec in itertools.product(*[[1, extreme]] * 3, [0, 1]):
        if max(start, length) < 2**64 and stored < 2**32:
            refusal(with_frame(deltas.head(1, start, length, b"x", codec=codec, stored=stored)))
    refusal(with_zstd(deltas.zstd_rle(1000, declared=extreme)))
"""
    )


def test_long_deltas_take_little_memory() -> None:
    in_little_memory(
        """
size = 1 << 40
noise = random.Random(1).randbytes(MAX_FRAME)

def write(writer):
    for index in range(60):
        writer.data(index * 3 * MAX_FRAME, noise)
        writer.data(index * 3 * MAX_FRAME, bytes(MAX_FRAME))
        writer.zero(0, size)

for level in (None, 1):
    with through_a_pipe(write, size, level) as file:
        reader = DeltaReader(file)
        assert sum(1 for _ in reader) == 180
"""
    )
