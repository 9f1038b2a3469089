"""Messages: what is packed comes back, and whatever else comes is refused within bounded memory."""

from __future__ import annotations

import itertools
import random
import re
import struct
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blktrack.ship.delta.format import Codec
from blktrack.ship.wire import digests, hello
from blktrack.ship.wire import message as wire
from blktrack.ship.wire.message import HEAD, Kind, Malformed, Message, Reader, pack, pack_json
from tests import handmade as made
from tests.blockdev import TOP
from tests.deltas import zstd_rle
from tests.handmade import MOST_DATA, MOST_JSON, MOST_ROWS
from tests.second_reader import xxh64

Rows = list[tuple[int, int]]


class End(Exception):
    """Of what is read."""


class Feed:
    """Fills from bytes, in pieces that end wherever `cuts` says."""

    def __init__(self, data: bytes, cuts: Sequence[int] = ()) -> None:
        self.data = data
        self.at = 0
        self.cuts = sorted(cuts)

    def __call__(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            stop = next((cut for cut in self.cuts if cut > self.at), len(self.data))
            part = self.data[self.at : min(stop, self.at + len(view) - done)]
            if not part:
                raise End
            view[done : done + len(part)] = part
            done += len(part)
            self.at += len(part)


def read(data: bytes) -> Message:
    return Reader(Feed(data)).next()


def joined(parts: Sequence[bytes | memoryview]) -> bytes:
    return b"".join(bytes(part) for part in parts)


rows_strategy = st.lists(
    st.tuples(st.integers(0, 2**63 - 1), st.integers(1, 300)), min_size=1, max_size=20
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[Kind, int, Rows, bytes, bool]:
    """Any valid message, and whether it is to be compressed."""
    kind = draw(st.sampled_from(Kind))
    request = draw(st.integers(0, 2**32 - 1))
    rows: Rows = []
    data = b""
    if kind in (Kind.WRITE, Kind.ZERO, Kind.COMPARE):
        rows = draw(rows_strategy)
    if kind is Kind.ZERO:
        rows = [(start, draw(st.integers(1, 2**63 - 1))) for start, _ in rows]
    if kind is Kind.WRITE:
        size = sum(length for _, length in rows)
        data = (draw(st.binary(min_size=1, max_size=8)) * size)[:size]
    elif kind not in (Kind.ZERO, Kind.PING, Kind.ALIVE):
        data = draw(st.binary(max_size=500))
    return kind, request, rows, data, kind is Kind.WRITE and draw(st.booleans())


@given(st.lists(messages(), min_size=1, max_size=4), st.data())
def test_round_trip(sent: list[tuple[Kind, int, Rows, bytes, bool]], choose: st.DataObject) -> None:
    stream, ends = b"", []
    for kind, request, rows, data, compress in sent:
        packed = zstandard.ZstdCompressor().compress(data) if compress else data
        if compress and len(packed) < len(data):
            parts = pack(kind, request, rows, [packed], codec=Codec.ZSTD, length=len(data))
        else:
            cut = choose.draw(st.integers(0, len(data)))
            parts = pack(kind, request, rows, [data[:cut], memoryview(data)[cut:]])
            # And by the other description of the same.
            assert joined(parts) == made.message(kind, request, rows, data)
        begin = len(stream)
        stream += joined(parts)
        ends += [begin, begin + HEAD.size, begin + HEAD.size + 16 * len(rows), len(stream)]
    near = [end + shift for end in ends for shift in (-1, 0, 1) if 0 < end + shift < len(stream)]
    cuts = choose.draw(st.lists(st.sampled_from(near))) if near else []
    if choose.draw(st.booleans()):
        cuts = list(range(len(stream)))
    feed = Feed(stream, cuts)
    reader = Reader(feed)
    for kind, request, rows, data, _ in sent:
        got = reader.next()
        assert (got.kind, got.request, bytes(got.data)) == (kind, request, data)
        assert got.rows.dtype == np.int64 and got.rows.shape == (len(rows), 2)
        assert [tuple(row) for row in got.rows.tolist()] == rows
    with pytest.raises(End):
        reader.next()
    cut_off = choose.draw(st.integers(0, len(stream) - 1))
    reader = Reader(Feed(stream[:cut_off]))
    with pytest.raises(End):
        while True:
            reader.next()


def test_numbers_of_the_format() -> None:
    assert {kind.name: int(kind) for kind in Kind} == {
        name: getattr(made, name) for name in Kind.__members__
    }
    assert struct.calcsize(made.HEAD) == made.HEAD_SIZE == HEAD.size
    assert (wire.MAX_DATA, wire.MAX_JSON, wire.MAX_ROWS) == (MOST_DATA, MOST_JSON, MOST_ROWS)


PAGE = (TOP / "docs/wire.md").read_text(encoding="utf-8")


def test_the_example_of_the_page() -> None:
    rows = re.findall(r"^    ([0-9a-f]{8})  ((?:[0-9a-f]{2} ?){1,16})(?:  |$)", PAGE, re.MULTILINE)
    ends = [index for index, (at, _) in enumerate(rows) if at == "00000000"]
    sent, answered = (
        b"".join(bytes.fromhex(row) for _, row in rows[begin:end])
        for begin, end in itertools.pairwise([*ends, len(rows)])
    )
    reader = Reader(Feed(sent))
    got = [reader.next() for _ in range(3)]
    assert [(one.kind, one.request, bytes(one.data), one.rows.tolist()) for one in got] == [
        (Kind.WRITE, 0, b"blktrack", [[4096, 8]]),
        (Kind.ZERO, 0, b"", [[8192, 4096]]),
        (Kind.FLUSH, 3, b'{"size":20000}', []),
    ]
    assert sent[56:][0] == Kind.ZERO and sent[104:][0] == Kind.FLUSH
    assert answered == joined(pack_json(Kind.DONE, 3, {}))
    with pytest.raises(End):
        reader.next()


def test_the_kinds_and_limits_of_the_page() -> None:
    kinds = re.findall(
        r"^\| (\d+) \| ([A-Z]+) \| (source|keeper) \| (–|yes) \|", PAGE, re.MULTILINE
    )
    assert {name: int(number) for number, name, _, _ in kinds} == dict(Kind.__members__)
    for number, name, side, extents in kinds:
        assert (side == "source") == (int(number) < 64)
        assert (extents == "yes") == (name in ("WRITE", "ZERO", "COMPARE"))
    for line in (
        f"| JSON | {MOST_JSON} bytes |",
        f"| digests; `length` of WRITE | {MOST_DATA} bytes |",
        f"how many: 0 to {MOST_ROWS} |",
        f"seconds, {hello.LEAST_PATIENCE:g} to {hello.MOST_PATIENCE:g}, after which",
        f"taken for dead; {hello.PATIENCE:g} if missing |",
        f"at the multiples of {digests.UNIT} into",
    ):
        assert line in PAGE, line


def test_the_largest() -> None:
    data = bytes(MOST_DATA)
    rows = [(index * 8192, 4096) for index in range(MOST_ROWS)]
    got = read(made.message(made.WRITE, 0, rows, data))
    assert len(got.rows) == MOST_ROWS and len(got.data) == MOST_DATA
    packed = zstandard.ZstdCompressor().compress(data)
    got = read(made.message(made.WRITE, 0, rows, packed, codec=1, length=MOST_DATA))
    assert bytes(got.data) == data
    text = b'"' + b"x" * (MOST_JSON - 2) + b'"'
    assert read(made.message(made.OPEN, 1, data=text)).json() == text
    with pytest.raises(ValueError, match="65537 bytes of JSON"):
        pack_json(Kind.DONE, 1, {"x": "x" * (MOST_JSON - 7)})
    assert len(joined(pack_json(Kind.DONE, 1, {"x": "x" * (MOST_JSON - 8)}))) == 32 + MOST_JSON


GOOD = made.message(made.WRITE, 0, [(4096, 8)], b"blktrack")
PACKED = zstandard.ZstdCompressor().compress(b"blktrack" * 512)


def write(packed: bytes, length: int) -> bytes:
    """Compressed data for one extent."""
    return made.message(made.WRITE, 0, [(0, length or 1)], packed, codec=1, length=length)


REFUSED = {
    "head damaged": (GOOD[:9] + b"\xff" + GOOD[10:], "head of a message does not match"),
    "checksum of the head": (GOOD[:31] + b"\xff" + GOOD[32:], "head of a message does not match"),
    "rows damaged": (GOOD[:34] + b"\xff" + GOOD[35:], "WRITE does not match"),
    "data damaged": (GOOD[:-1] + b"K", "WRITE does not match"),
    "kind 0": (made.message(0), "kind 0 and codec 0"),
    "kind 13": (made.message(13), "kind 13"),
    "kind 255": (made.message(255), "kind 255"),
    "codec": (made.message(made.WRITE, 0, [(0, 1)], b"x", codec=2), "codec 2"),
    "no rows": (made.message(made.WRITE), "WRITE has 0 extents"),
    "nothing compared": (made.message(made.COMPARE, 1, data=bytes(20)), "COMPARE has 0 extents"),
    "rows where none may be": (made.message(made.OPEN, 1, [(0, 1)], b"{}"), "OPEN has 1 extents"),
    "too many rows": (
        made.message(made.ZERO, 0, [(index, 1) for index in range(MOST_ROWS + 1)]),
        "ZERO has 1025 extents",
    ),
    "too much data": (
        made.head(made.WRITE, count=1, stored=MOST_DATA + 1),
        "4194305 bytes, and 4194304",
    ),
    "all of 32 bits": (made.head(made.WRITE, count=1, stored=2**32 - 1), "4294967295 bytes"),
    "too much compressed": (
        made.head(made.WRITE, codec=1, count=1, stored=9, length=MOST_DATA + 1),
        "4194305 bytes",
    ),
    "too much JSON": (made.head(made.OPEN, request=1, stored=MOST_JSON + 1), "OPEN has 65537"),
    "too much of an answer": (made.head(made.DONE, stored=MOST_JSON + 1), "DONE has 65537"),
    "too many digests": (made.head(made.DIGESTS, stored=MOST_DATA + 1), "DIGESTS has 4194305"),
    "zeroes with data": (made.message(made.ZERO, 0, [(0, 1)], b"x"), "ZERO has 1 bytes, and 0"),
    "a beat with data": (made.message(made.PING, 0, data=b"x"), "PING has 1 bytes, and 0"),
    "two lengths": (
        made.message(made.WRITE, 0, [(0, 9)], b"blktrack", length=9),
        "WRITE has two lengths",
    ),
    "compressed JSON": (
        made.message(made.OPEN, 1, data=PACKED, codec=1, length=4096),
        "OPEN is compressed",
    ),
    "compressed digests": (
        made.message(made.COMPARE, 1, [(0, 1)], PACKED, codec=1, length=4096),
        "COMPARE is compressed",
    ),
    "compressed nothing": (write(b"", 1), "WRITE is compressed"),
    "compressed to more": (write(PACKED, len(PACKED)), "WRITE is compressed"),
    "not zstd": (write(b"blktrack", 4096), "no zstd frame of 4096 bytes"),
    "half a frame": (write(PACKED[:-3], 4096), "no zstd frame of 4096 bytes"),
    "more than a frame": (write(PACKED + b"x", 4096), "no zstd frame of 4096 bytes"),
    "two frames": (write(PACKED * 2, 4096), "no zstd frame of 4096 bytes"),
    "a frame of less": (write(PACKED, 4097), "no zstd frame of 4097 bytes"),
    "a frame of more": (write(zstd_rle(2**30), 2**20), "no zstd frame"),
    "a frame that lies": (write(zstd_rle(2**24, declared=2**20), 2**20), "no zstd frame"),
    "a frame of everything": (write(zstd_rle(2**10, declared=2**63), 2**20), "no zstd frame"),
    "a large window": (write(zstd_rle(2**20, window_log=30), 2**20), "no zstd frame"),
    "a start of 2**63": (made.message(made.ZERO, 0, [(2**63, 1)]), "an extent with no place"),
    "a start of -1": (made.message(made.ZERO, 0, [(0, 1), (-1, 1)]), "an extent with no place"),
    "a length of 0": (made.message(made.ZERO, 0, [(0, 0)]), "an extent with no place"),
    "a length of 2**63": (made.message(made.ZERO, 0, [(0, 2**63)]), "an extent with no place"),
    "a length of -1": (made.message(made.WRITE, 0, [(0, 2), (2, -1)], b"x"), "with no place"),
    "more compared than fits": (
        made.message(made.COMPARE, 1, [(0, MOST_DATA), (2**40, 1)], bytes(20)),
        "extents of more than 4194304 bytes",
    ),
    "sums that overflow": (
        made.message(made.WRITE, 0, [(0, 2**62)] * 4 + [(0, 1)], b"x"),
        "extents of more than 4194304 bytes",
    ),
    "data that is too short": (
        made.message(made.WRITE, 0, [(0, 9)], b"blktrack"),
        "WRITE has not the data of its extents",
    ),
    "data that is too long": (
        made.message(made.WRITE, 0, [(0, 3), (9, 4)], b"blktrack"),
        "WRITE has not the data of its extents",
    ),
    "compressed data of others": (
        made.message(made.WRITE, 0, [(0, 4095)], PACKED, codec=1, length=4096),
        "WRITE has not the data of its extents",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, why = REFUSED[name]
    with pytest.raises(Malformed, match=why):
        read(data)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_within_bounds(name: str) -> None:
    """What is allocated follows what is allowed and what came, never what is said."""
    data, _ = REFUSED[name]
    read(GOOD)
    reader = Reader(Feed(write(PACKED, 4096) + data))
    reader.next()  # a decompressor has its own memory
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            reader.next()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(data) + (1 << 21), f"{peak} bytes for a message of {len(data)}"


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A stream that was damaged, or that lies with right checksums."""
    match rng.randrange(6):
        case 0:
            out = bytearray(data)
            for _ in range(rng.choice([1, 1, 2, 8])):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            return bytes(out)
        case 1:
            return data[: rng.randrange(len(data))]
        case 2:
            cut = rng.randrange(len(data))
            return data[:cut] + rng.randbytes(rng.randrange(64)) + data[cut:]
        case 3:  # rows or data replaced, the checksums right
            fields = list(struct.unpack(made.HEAD, data[:32]))
            follows = bytearray(data[32:] or b"\0")
            for _ in range(rng.choice([1, 2, 8])):
                follows[rng.randrange(len(follows))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            return sealed(fields, bytes(follows))
        case 4:  # rows of extremes
            fields = list(struct.unpack(made.HEAD, data[:32]))
            rows = [(rng.choice(made.WIDE), rng.choice(made.WIDE)) for _ in range(fields[2])]
            return sealed(fields, made.table(rows) + data[32 + 16 * fields[2] :])
        case _:  # any field of the head
            fields = list(struct.unpack(made.HEAD, data[:32]))
            which = rng.randrange(6)
            limit = [2**8, 2**8, 2**16, 2**32, 2**32, 2**32][which]
            fields[which] = rng.choice([*made.EXTREMES, fields[which] + 1, *range(13)]) % limit
            return sealed(fields, data[32:])


def sealed(fields: list[int], follows: bytes) -> bytes:
    fields[6] = xxh64(follows)
    raw = struct.pack(made.HEAD[:-1], *fields[:-1])
    return raw + struct.pack("<Q", xxh64(raw)) + follows


def base(rng: random.Random) -> bytes:
    """A valid message."""
    kind = rng.choice([*made.KINDS, *made.ANSWERS, made.WRITE, made.WRITE, made.WRITE])
    rows, data = [], b""
    if kind in (made.WRITE, made.ZERO, made.COMPARE):
        rows = [(rng.randrange(2**40), rng.randint(1, 999)) for _ in range(rng.randint(1, 9))]
    if kind == made.WRITE:
        data = rng.randbytes(7) * (sum(length for _, length in rows) // 7 + 1)
        data = data[: sum(length for _, length in rows)]
        packed = zstandard.ZstdCompressor().compress(data)
        if len(packed) < len(data) and rng.random() < 0.6:
            return made.message(kind, 0, rows, packed, codec=1, length=len(data))
    elif kind not in (made.ZERO, made.PING, made.ALIVE):
        data = rng.randbytes(rng.randrange(300))
    return made.message(kind, rng.choice([0, 1, 2**32 - 1]), rows, data)


def check(data: bytes) -> str:
    """What a stream comes to: messages that keep every promise, then its end or a refusal."""
    reader = Reader(Feed(data))
    try:
        while True:
            got = reader.next()
            rows = got.rows.tolist()
            assert len(rows) <= MOST_ROWS and len(got.data) <= MOST_DATA
            assert all(0 <= start < 2**63 and 0 < length < 2**63 for start, length in rows)
            if got.kind is Kind.WRITE:
                assert sum(length for _, length in rows) == len(got.data)
            if got.kind is Kind.COMPARE:
                assert sum(length for _, length in rows) <= MOST_DATA
            assert bool(rows) == (got.kind in (Kind.WRITE, Kind.ZERO, Kind.COMPARE))
    except Malformed as error:
        return str(error)
    except End:
        return ""


def campaign(seed: int, count: int) -> None:
    rng = random.Random(seed)
    ends = {"": 0, "refused": 0}
    for index in range(count):
        good = base(rng)
        assert check(good) == ""
        bad = mutate(good, rng) + base(rng) * (rng.random() < 0.3)
        try:
            ends["refused" if check(bad) else ""] += 1
        except BaseException as error:
            error.add_note(f"BLKTRACK_SEED={seed}, mutation {index}: {bad[:2000].hex()}")
            raise
    print(f"BLKTRACK_SEED={seed}: {count} messages: {ends}")
    assert all(ends.values()), ends


def test_mutated_messages(seed: int) -> None:
    campaign(seed, 5000)


@pytest.mark.soak
def test_many_mutated_messages(seed: int) -> None:
    for turn in range(50):
        campaign(seed + turn, 5000)
