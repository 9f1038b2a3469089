"""A kept stage whose files are damaged, or came out of a power cut: less of it, nothing wrong."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blktrack.linux import PAGE
from blktrack.ship import partial
from blktrack.ship.stage import Stage
from blktrack.units import MIB
from tests.kept import BASE, LINK, SMALL, Kept, resume, seal, state_of
from tests.loopdev import MEMORY

State = tuple[list[list[int]], bytes]
DIGEST = 20


class Saved:
    """A folder with a kept stage of several checkpoints, and what it held at each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.size = folder / "replica", SMALL
        kept = Kept(self.folder, self.size, seed)
        self.states: list[State] = [kept.state()]
        self.ends = [self.length]
        self.packed = [0]
        for _ in range(4):
            kept.write_some()
            kept.stage.checkpoint()
            self.states.append(kept.state())
            self.ends.append(self.length)
            self.packed.append(self.pack_needed())
        kept.stage.close()
        self.journal = (self.folder / "incoming.part").read_bytes()
        self._whole = (self.folder / "incoming.pack").read_bytes()[: self.packed[-1] + 3 * PAGE]
        self.pack = self._whole[: self.packed[-1]]

    @property
    def length(self) -> int:
        return (self.folder / "incoming.part").stat().st_size

    def pack_needed(self) -> int:
        found = partial.read(self.folder, 1 << 40)
        assert found is not None
        return found.packed

    def put(self, journal: bytes | None = None, pack: bytes | None = None) -> None:
        (self.folder / "incoming.part").write_bytes(self.journal if journal is None else journal)
        (self.folder / "incoming.pack").write_bytes(self._whole if pack is None else pack)

    def held(self) -> int | None:
        """How many checkpoints of it are there; None if there is no stage. All else would be
        wrong."""
        stage = resume(self.folder, self.size)
        if stage is None:
            return None
        with stage:
            state = state_of(stage)
            number = next((i for i, known in enumerate(self.states) if known == state), None)
            assert number is not None, "it holds what it never held"
            # Nothing follows what is gone on with.
            assert self.length == self.ends[number]
            assert (self.folder / "incoming.pack").stat().st_size == self.packed[number]
        return number


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: what is flushed there as often as here takes minutes elsewhere."""
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="blktrack-") as name:
        yield Path(name)


@pytest.fixture
def saved(folder: Path, seed: int) -> Saved:
    return Saved(folder, seed)


def test_cut_off_anywhere(saved: Saved) -> None:
    for length in range(len(saved.journal) + 1):
        whole = [number for number, end in enumerate(saved.ends) if end <= length]
        saved.put(journal=saved.journal[:length])
        assert saved.held() == (whole[-1] if whole else None), length


def test_a_wrong_bit_anywhere(saved: Saved, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 8, len(saved.journal))
    for place, bit in enumerate(bits.tolist()):
        data = bytearray(saved.journal)
        data[place] ^= 1 << bit
        before = [number for number, end in enumerate(saved.ends) if end <= place]
        saved.put(journal=bytes(data))
        assert saved.held() == (before[-1] if before else None), place


def test_a_pack_that_is_too_short(saved: Saved) -> None:
    for length in {*range(0, saved.packed[-1], PAGE), *(end - 1 for end in saved.packed[1:])}:
        saved.put(pack=saved.pack[:length])
        whole = [number for number, end in enumerate(saved.packed) if end <= length]
        assert saved.held() == whole[-1], length


def test_frames_of_another_history(saved: Saved, folder: Path, seed: int) -> None:
    """Such as a file system may bring back behind the end of a file that was cut."""
    other = Saved(folder / "other", seed + 1)
    for number, end in enumerate(saved.ends):
        for follows in (other.journal[other.ends[0] :], other.journal[other.ends[1] :]):
            saved.put(journal=saved.journal[:end] + follows)
            assert saved.held() == number
        if number:
            saved.put(journal=saved.journal[:end] + saved.journal[saved.ends[number - 1] :])
            assert saved.held() == number, "the same frame twice"


def over(before: bytes, head: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(before + head + data, digest_size=DIGEST).digest()


def frame(before: bytes, data: bytes, packed: int) -> bytes:
    """One whose digest is right."""
    head = struct.pack("<QQ", len(data), packed)
    return head + data + over(before, head, data)


def rows(*of: tuple[int, int, int]) -> bytes:
    return np.array(of, dtype="<i8").tobytes()


HUGE = (1 << 63) - PAGE
# What no stage would note, with the length of the pack that it asks for, from the one before on.
BATCHES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 0),
    "half a row": (rows((0, 512, -1))[:-1], 0),
    "beyond the end": (rows((SMALL - 512, 1024, -1)), 0),
    "of no length": (rows((0, 0, -1)), 0),
    "before the beginning": (rows((-512, 1024, -1)), 0),
    "a sum that overflows": (rows((512, HUGE, -1)), 0),
    "data beyond the pack": (rows((0, PAGE, 1 << 40)), 0),
    "data before the pack": (rows((0, PAGE, -PAGE)), 0),
    "data whose sum overflows": (rows((0, PAGE, HUGE)), 0),
    "data that lies askew": (rows((0, 512, 512)), 0),
    "a pack that shrinks": (rows((0, 512, -1)), -PAGE),
    "a pack of half a page": (rows((0, 512, -1)), 512),
    "a pack that is not there": (rows((0, 512, -1)), MIB * MIB),
    "a pack whose length overflows": (rows((0, 512, -1)), HUGE),
    "more rows than one batch has": (rows(*[(0, 512, -1)] * 40_001), 0),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_batches_that_make_no_sense(saved: Saved, batch: str) -> None:
    """With every digest right."""
    data, more = BATCHES[batch]
    bad = frame(saved.journal[-DIGEST:], data, saved.packed[-1] + more)
    saved.put(journal=saved.journal + bad)
    assert saved.held() == len(saved.states) - 1


def test_a_journal_of_more_than_could_be(saved: Saved) -> None:
    """It is not read to its end: memory is taken in proportion to the pack and the source."""
    journal, batch = bytearray(saved.journal), rows(*[(0, 512, -1)] * 40_000)
    for _ in range(10):
        journal += frame(bytes(journal[-DIGEST:]), batch, saved.packed[-1])
    saved.put(journal=bytes(journal))
    stage = resume(saved.folder, saved.size)
    assert stage is not None
    with stage:
        assert 40_000 <= len(stage.end.index()) < 160_000
    with open(saved.folder / "incoming.part", "r+b") as file:
        file.truncate(1 << 40)
    assert resume(saved.folder, saved.size) is not None


def head(**changes: Any) -> Callable[[dict[str, Any]], bytes]:
    def made(value: dict[str, Any]) -> bytes:
        return json.dumps({**value, **changes}).encode()

    return made


def without(key: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda value: json.dumps({name: value[name] for name in value if name != key}).encode()


HEADS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "a newer version": head(format=2),
    "no version": without("format"),
    "a text for a size": head(size="x"),
    "a negative size": head(size=-1),
    "a size beyond any": head(size=1 << 80),
    "a list for a link": head(link=[]),
    "no id": without("id"),
    "no point": head(base=None),
    "a list for a point": head(base=[1]),
    "no object": lambda _: b"[]",
    "no JSON": lambda _: b"\xff{",
    "nothing": lambda _: b"",
    "a deep one": lambda _: b"[" * 60_000,
    "a long one": lambda _: b" " * (64 << 10) + b"{}",
}


@pytest.mark.parametrize("change", HEADS)
def test_a_head_that_makes_no_sense(saved: Saved, change: str) -> None:
    """With its digest right."""
    length, _ = struct.unpack_from("<QQ", saved.journal)
    value = json.loads(saved.journal[16 : 16 + length])
    saved.put(journal=frame(b"", HEADS[change](value), 0))
    assert saved.held() is None
    assert partial.read_head(saved.folder) is None
    assert Stage.find(saved.folder) is None
    assert not list(saved.folder.glob("*incoming*")), "it is dropped"


def replaced(name: str, how: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.rename(folder / "elsewhere")
        match how:
            case "link":
                path.symlink_to("elsewhere")
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()

    return change


@pytest.mark.parametrize("name", ["incoming.part", "incoming.pack"])
@pytest.mark.parametrize("how", ["gone", "link", "pipe", "folder"])
def test_other_than_files(saved: Saved, name: str, how: str) -> None:
    replaced(name, how)(saved.folder)
    assert saved.held() is None
    assert (saved.folder / "elsewhere").stat().st_size, "nothing was cut"
    if how != "folder":
        Stage.create(saved.folder, saved.size, link=LINK, base=BASE, keep=True).close()
        assert saved.held() == 0, "a new one is made in its place"


@pytest.mark.parametrize("pack", ["lost", "garbage", "zero", "all"])
@pytest.mark.parametrize("journal", ["lost", "garbage", "zero", "part"])
def test_power_cuts(folder: Path, seed: int, pack: str, journal: str) -> None:
    """What was not flushed may be anything. What comes next is right all the same."""
    kept = Kept(folder, 4 * MIB, seed)
    rng = kept.rng
    kept.write_some(40)
    kept.stage.checkpoint()
    known = kept.state()
    durable = (folder / "incoming.part").read_bytes()
    found = partial.read(folder, 1 << 40)
    assert found is not None
    kept.write_some(40)
    kept.stage.close()
    after = {name: (folder / name).read_bytes() for name in ("incoming.part", "incoming.pack")}
    tail = len(after["incoming.part"]) - len(durable)
    (folder / "incoming.part").write_bytes(
        durable
        + {
            "lost": b"",
            "garbage": rng.bytes(tail),
            "zero": bytes(tail),
            "part": after["incoming.part"][len(durable) : -int(rng.integers(1, tail))],
        }[journal]
    )
    whole, beyond = after["incoming.pack"], len(after["incoming.pack"]) - found.packed
    (folder / "incoming.pack").write_bytes(
        whole[: found.packed]
        + {
            "lost": b"",
            "garbage": rng.bytes(min(beyond, MIB)),
            "zero": bytes(beyond),
            "all": whole[found.packed :],
        }[pack]
    )
    stage = kept.resume()
    assert stage is not None
    assert state_of(stage) == known
    kept.stage, kept.image = stage, bytearray(known[1])
    kept.covered = stage.staged
    kept.write_some(40)
    stage.checkpoint()
    assert state_of(stage) == kept.state()
    kept.write_some(40)
    stage.close()
    resumed = kept.resume()
    assert resumed is not None
    with resumed:
        assert state_of(resumed) == kept.state()
        seal(resumed, kept.covered)
    sealed = Stage.find(folder)
    assert sealed is not None
    with sealed:
        assert sealed.header is not None
    with open(folder / "incoming.pack", "rb") as file:
        data, image = file.read(), bytearray(kept.size)
        for start, length, place in sealed.index.tolist():
            image[start : start + length] = (
                bytes(length) if place < 0 else data[place : place + length]
            )
    assert bytes(image) == bytes(kept.image)
