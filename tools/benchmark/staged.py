"""What it costs that an increment is staged and applied whole, against a copy straight in place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from blktrack.extent import ExtentArray, from_pairs
from blktrack.units import GIB, KIB, MIB
from tools.benchmark.figure import Figure, Run, medians
from tools.benchmark.lab import Disk, Lab, run, same
from tools.benchmark.replicate import order

NAMES = ("staged",)
SIZE = GIB
CHANGED = 256 * MIB
_LEAST, _MOST = 4 * KIB, MIB  # of an extent
_KINDS = {"ext4": "on ext4", "xfs": "on xfs with reflinks"}


def measure(lab: Lab, wanted: set[str], *, quick: bool) -> Iterator[Figure]:
    with lab.device(SIZE) as source:
        for kind in _KINDS:
            yield _staged(lab, source, kind, rounds=2 if quick else 7)


def _staged(lab: Lab, source: Disk, kind: str, *, rounds: int) -> Figure:
    figure = Figure(
        "staged",
        f"increment staged and applied / copied in place, {_KINDS[kind]}: time",
        note=f"{CHANGED // MIB} MiB of 1 GiB in extents of 4 KiB to 1 MiB at random places, to two "
        f"replica files on a {kind} of a loop device in memory, each always brought on in its way, "
        "from the open replica to its new point on record, both ends durable, in a fresh process; "
        "the replica compared after each",
    )
    with lab.device(4 * GIB, filled=0) as disk, lab.mounted(disk, kind) as folder:
        replicas = {way: folder / way for way in ("place", "stage")}
        for path in replicas.values():
            _bring(source, path, "place", from_pairs([(0, SIZE)]))
        for number in range(rounds):
            lab.need(CHANGED)
            extents = lab.fill(source, _places())
            done: dict[str, Run] = {}
            for way in order(list(replicas), number):
                done[way] = _bring(source, replicas[way], way, extents)
            figure.values.append(done["stage"]["seconds"] / done["place"]["seconds"])
            figure.runs.append(
                {
                    "place_seconds": done["place"]["seconds"],
                    "staged_seconds": done["stage"]["seconds"],
                    "until_sealed_seconds": done["stage"]["stage_seconds"],
                    "apply_seconds": done["stage"]["apply_seconds"],
                    "extents": len(extents),
                }
            )
    figure.parts = medians(figure.runs)
    return figure


def _bring(source: Disk, replica: Path, way: str, extents: ExtentArray) -> Run:
    inside = (sys.executable, "-m", "tools.benchmark.inside", way, source.path, str(replica))
    lines = "".join(f"{start} {length}\n" for start, length in extents.tolist())
    done: Run = json.loads(run(*inside, text=lines))
    same(source, Disk(str(replica), replica, SIZE))
    return done


def _places() -> list[tuple[int, int]]:
    """Random places, sorted, none overlapping; as many from 4 to 8 KiB as from 512 KiB to 1 MiB."""
    rng = np.random.default_rng()
    lengths: list[int] = []
    while (left := CHANGED - sum(lengths)) > 0:
        length = int(_LEAST * 2 ** rng.uniform(0, np.log2(_MOST / _LEAST)))
        lengths.append(min(left, length // _LEAST * _LEAST))
    gaps = np.sort(rng.integers(0, (SIZE - CHANGED) // _LEAST, len(lengths))) * _LEAST
    before = np.cumsum([0, *lengths[:-1]])
    return list(zip((gaps + before).tolist(), lengths, strict=True))
