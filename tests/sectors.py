"""Sectors that describe themselves, so that a wrong copy of one tells what went wrong.

A sector is 64 little-endian words: magic, byte offset on the device, sequence number of the write,
checksum, and a filler that follows from offset and sequence.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from blktrack.extent import ExtentArray
from blktrack.units import MIB, SECTOR

Image = NDArray[np.uint8]

MAGIC = np.uint64(0x626C_6B74_7261_636B)
_WORDS = SECTOR // 8
_OFFSET, _SEQUENCE, _CHECKSUM, _FILLER = 1, 2, 3, 4
# Odd, so that each word counts in the checksum with all of its bits, and all differently.
_WEIGHTS = np.arange(_WORDS, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C16) + np.uint64(1)
_WEIGHTS[_CHECKSUM] = 0
_SLICE = 16 * MIB


def make(offset: int, length: int, sequence: int) -> Image:
    """The sectors of one write: `length` bytes for byte `offset` on, both whole sectors."""
    places = np.arange(offset, offset + length, SECTOR, dtype=np.uint64)
    salt = sequence * 0xD6E8_FEB8_6659_FD93 % (1 << 64)
    seed = (places + np.uint64(salt))[:, np.newaxis]
    words = seed * _WEIGHTS
    words[:, 0] = MAGIC
    words[:, _OFFSET] = places
    words[:, _SEQUENCE] = sequence
    words[:, _CHECKSUM] = _checksums(words)
    return words.reshape(-1).view(np.uint8)


def _checksums(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return np.asarray((words * _WEIGHTS).sum(axis=1, dtype=np.uint64))


def differing(one: Image, other: Image) -> NDArray[np.int64]:
    """Numbers of the sectors in which two images of one size differ by at least a byte."""
    assert len(one) == len(other)
    found = []
    for start in range(0, len(one), _SLICE):
        a, b = (image[start : start + _SLICE].view(np.uint64) for image in (one, other))
        differs = (a != b).reshape(-1, _WORDS).any(axis=1)
        found.append(np.flatnonzero(differs) + start // SECTOR)
    return np.concatenate(found)


def uncovered(sectors: NDArray[np.int64], extents: ExtentArray) -> NDArray[np.int64]:
    """Those of `sectors` that do not lie wholly inside the extents."""
    if not len(extents):
        return sectors
    at = np.searchsorted(extents[:, 0], sectors * SECTOR, side="right") - 1
    inside = (at >= 0) & ((sectors + 1) * SECTOR <= extents[at].sum(axis=1))
    return np.asarray(sectors[~inside])


class Fault(NamedTuple):
    """A sector of a replica that is not its source's, and in what way.

    lost      -- a write never arrived: the source describes itself, the replica holds nothing known
    stale     -- the replica holds another write to this very place
    misplaced -- the replica holds a sector of another place
    torn      -- the replica holds a mix of several writes
    unknown   -- neither describes itself (the data of a file system)
    """

    offset: int
    kind: str
    detail: str


def faults(source: Image, replica: Image) -> list[Fault]:
    """Every sector that differs, judged by what the two say of themselves."""
    found = []
    for number in differing(source, replica).tolist():
        cut = slice(number * SECTOR, (number + 1) * SECTOR)
        found.append(_judge(number * SECTOR, source[cut], replica[cut]))
    return found


def _judge(offset: int, source: Image, replica: Image) -> Fault:
    wanted, held = source.view(np.uint64), replica.view(np.uint64)
    known = _sound(wanted) and wanted[_OFFSET] == offset
    write = f"write {wanted[_SEQUENCE]}" if known else "what nobody stamped"
    if held[0] == MAGIC or held[_OFFSET] == offset:
        if not _sound(held):
            return Fault(offset, "torn", f"several writes mixed, where the source has {write}")
        if held[_OFFSET] != offset:
            return Fault(offset, "misplaced", f"the sector of byte {held[_OFFSET]}")
        return Fault(offset, "stale", f"write {held[_SEQUENCE]}, where the source has {write}")
    if known:
        return Fault(offset, "lost", f"{write} of the source never came")
    return Fault(offset, "unknown", "both hold what nobody stamped")


def _sound(words: NDArray[np.uint64]) -> bool:
    return bool(words[0] == MAGIC and words[_CHECKSUM] == _checksums(words[np.newaxis])[0])


def describe(found: list[Fault], shown: int = 3) -> str:
    """How many of each kind, and a few of each."""
    lines = []
    for kind, count in Counter(fault.kind for fault in found).items():
        lines.append(f"{count} sectors {kind}:")
        some = [fault for fault in found if fault.kind == kind][:shown]
        lines += [f"  at byte {fault.offset}: {fault.detail}" for fault in some]
    return "\n".join(lines)
