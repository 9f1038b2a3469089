"""Chains of writes whose order a replica must respect, and the judgement whether it does.

A chain is a sequence of direct writes of one block each, every one issued only after the one before
completed. Each sector carries the number of its write. After a power cut a disk holds a prefix of
each chain, with at most the write that was in flight torn; so must a replica that is at a point.
The prefix has all that had completed before the cut, and nothing that was begun after it.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blktrack.units import KIB, SECTOR

BLOCK = 4 * KIB
HOT, COLD = 8, 2040  # blocks of a chain: most writes go to the few hot ones
CHAIN = (HOT + COLD) * BLOCK  # bytes
LONGEST = 16_000_000  # writes of one chain
LATEST = 4 * 8 * COLD  # so many go to every block

_SECTOR = np.dtype([("magic", "u8"), ("chain", "u8"), ("number", "u8"), ("pad", "V488")])
_MAGIC = 0x6368_6169_6E73_0001

Numbers = NDArray[np.int64]


def places(numbers: Numbers) -> Numbers:
    """The block of its chain that each write goes to: seven of eight to the hot ones."""
    hot = (numbers * 2654435761 >> 7) % HOT
    cold = HOT + (numbers // 8 * 40503 + numbers // 8 // COLD) % COLD
    return np.where(numbers % 8 != 0, hot, cold)


class Log:
    """What writers have begun and completed, and when: a file that is memory to them and to us."""

    def __init__(self, path: Path, chains: int) -> None:
        size = chains * 2 * 8 * (1 + LONGEST)
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) < size:
                file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        counts = np.frombuffer(self._memory, dtype=np.int64, count=2 * chains)
        self.begun, self.done = counts[:chains], counts[chains:]
        times = np.frombuffer(self._memory, dtype=np.float64, offset=chains * 16)
        self.begins, self.ends = times.reshape(2, chains, LONGEST)

    def completed_before(self, chain: int, instant: float) -> int:
        """Writes of a chain that had completed, for their writer to know, by then."""
        known = self.ends[chain, 1 : int(self.done[chain]) + 1]
        return int(np.searchsorted(known, instant, side="left"))

    def begun_by(self, chain: int, instant: float) -> int:
        """Writes of a chain that may have been begun by then: no others were."""
        known = self.begins[chain, 1 : int(self.begun[chain]) + 1]
        return int(np.searchsorted(known, instant, side="right"))


def stamp(memory: mmap.mmap, chain: int, number: int) -> int:
    """Make the block of a write; the byte of the disk that it goes to."""
    block = np.frombuffer(memory, dtype=_SECTOR)
    block["magic"], block["chain"], block["number"] = _MAGIC, chain, number
    return chain * CHAIN + int(places(np.array([number]))[0]) * BLOCK


def write(path: str, log_path: str, chains: list[int], count: int, pace: float) -> None:
    """Write these chains in turn, at most `pace` writes a second in all, until killed."""
    log = Log(Path(log_path), count)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, BLOCK)
    due = time.monotonic()
    order = random.Random(chains[0])
    while True:
        chain = order.choice(chains)
        number = int(log.done[chain]) + 1
        offset = stamp(memory, chain, number)
        log.begins[chain, number] = time.time()
        log.begun[chain] = number
        os.pwrite(fd, memory, offset)
        log.ends[chain, number] = time.time()
        log.done[chain] = number
        if pace:
            due += 1 / pace
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)


@dataclass(frozen=True)
class Verdict:
    """How long a prefix of a chain is there; `fault` says what is wrong with it."""

    prefix: int
    fault: str = ""


def judge(image: NDArray[np.uint8], chain: int, least: int, most: int) -> Verdict:
    """Whether a region of a replica holds a prefix of its chain, of at least `least` writes, and
    nothing of those after `most`."""
    sectors = image[chain * CHAIN :][:CHAIN].view(_SECTOR).reshape(HOT + COLD, BLOCK // SECTOR)
    found = np.where(sectors["magic"] == _MAGIC, sectors["number"], 0).astype(np.int64)
    if (sectors["chain"][found > 0] != chain).any():
        return Verdict(0, f"chain {chain} holds sectors of another")
    last = int(found.max())
    torn = last > 0 and not (found[places(np.array([last]))[0]] == last).all()
    prefix = last - 1 if torn else last
    numbers = np.arange(max(prefix - LATEST, 0) + 1, prefix + 1)
    expected = np.zeros(HOT + COLD, dtype=np.int64)
    expected[places(numbers)] = numbers  # of writes to one block the last stays
    assert prefix <= LATEST or expected.all()
    wrong = found != expected[:, None]
    if torn:
        wrong[places(np.array([last]))[0]] &= found[places(np.array([last]))[0]] != last
    if wrong.any():
        block, sector = (int(index[0]) for index in np.nonzero(wrong))
        return Verdict(
            prefix,
            f"chain {chain}: {int(wrong.sum())} sectors are wrong; block {block} sector {sector} "
            f"is of write {found[block, sector]}, where {expected[block]} belongs below {last}",
        )
    if prefix < least:
        return Verdict(prefix, f"chain {chain} ends at {prefix}, {least} were completed before")
    if last > most:
        return Verdict(prefix, f"chain {chain} holds some of {last}, {most} were begun by then")
    return Verdict(prefix)


if __name__ == "__main__":
    path, log, chains, count, pace = sys.argv[1:]
    write(path, log, [int(word) for word in chains.split(",")], int(count), float(pace))
