"""A process that brings a replica on, to be killed: python -m tests.stager ORDER, an Order as JSON.

It says "ready" when all is imported and begins when it reads a line, so that a death at a random
moment is one of the work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from blktrack import extent
from blktrack.config import Paths
from blktrack.point import Point
from blktrack.ship.apply import finish
from blktrack.ship.copy import copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.replica import Replica
from blktrack.sysfs import BlockDevice

TOP = Path(__file__).resolve().parent.parent
LINK = "link-1"


@dataclass
class Order:
    what: str  # "apply": stage and apply; "open": only open to write; "finish": without the source
    folder: str  # of run and lib
    target: str
    source: str
    decoy: str  # from which a first round reads what the second overrides
    extents: list[list[int]]
    epoch: int

    @property
    def paths(self) -> Paths:
        base = Path(self.folder)
        return Paths(base / "pins", base / "run", base / "lib", base / "policy")


def point(epoch: int) -> Point:
    return Point(epoch, "generation-1", 1700000000.5 + epoch, "crash")


def open_replica(order: Order) -> Replica:
    source = BlockDevice.find(order.source)
    return Replica.open(order.target, source=source, link=LINK, paths=order.paths)


def bring(order: Order) -> None:
    """In two rounds, of which the second overrides part of the first."""
    pairs = [(start, length) for start, length in order.extents]
    every = extent.from_pairs(pairs)
    with (
        open_replica(order) as replica,
        replica.stage() as stage,
        open_end(order.source) as source,
        open_end(order.decoy) as decoy,
    ):
        copy(decoy, stage.end, every[::2])
        copy(source, stage.end, every)
        stage.seal(every, point(order.epoch))
        replica.apply(stage)


class Child:
    seconds = 0.0  # that its work took

    def __init__(self, order: Order, crash: str = "", commands: Path = TOP) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stager", json.dumps(dataclasses.asdict(order))],
            cwd=commands,
            env={**os.environ, "BLKTRACK_CRASH": crash},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, seconds: float | None = None) -> bool:
        """Whether it died, after so many seconds or at the place it was to."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            begun = time.monotonic()
            process.stdin.write("\n")
            process.stdin.flush()
            if seconds is not None:
                time.sleep(seconds)
                process.kill()
            _, errors = process.communicate(timeout=60)
            self.seconds = time.monotonic() - begun
        finally:
            process.kill()
            process.wait()
        assert not errors, errors
        assert process.returncode in (0, -signal.SIGKILL)
        return process.returncode != 0


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    match order.what:
        case "apply":
            bring(order)
        case "open":
            open_replica(order).close()
        case "finish":
            finish(order.target, order.paths)


if __name__ == "__main__":
    main()
