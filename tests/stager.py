"""A process whose children bring a replica on, to be killed: python -m tests.stager.

Each line that it reads is an order for one child. A child is forked when all has been imported: it
costs little, and its death at a random moment is one of the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from blktrack import crash, extent
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
    # "apply": stage and apply; "parts": the same, but in parts that are kept; "open": only open to
    # write; "finish": without the source
    what: str
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


PARTS = 5


def told(order: Order) -> Path:
    """Where `bring_in_parts` tells what is durable, a line for each: the stage, the part and the
    round. It outlives the death of a process, as what was sent to another host does."""
    return Path(order.folder) / "told"


def part(order: Order, number: int) -> extent.ExtentArray:
    return extent.from_pairs([(start, length) for start, length in order.extents[number::PARTS]])


def bring_in_parts(order: Order) -> None:
    """As from another host: it goes on where an earlier one has told to be."""
    with open_replica(order) as replica:
        stage = replica.partial() or replica.stage(keep=True)
        known = told(order).read_text().split("\n") if told(order).exists() else []
        with stage, open_end(order.source) as source, open_end(order.decoy) as decoy:
            with open(told(order), "a") as tell:
                for number in range(PARTS):
                    rounds = ((decoy, part(order, number)[::2]), (source, part(order, number)))
                    for turn, (end, extents) in enumerate(rounds):
                        line = f"{stage.id} {number} {turn}"
                        if f"{stage.id} {number} 1" in known:
                            continue
                        copy(end, stage.end, extents)
                        stage.checkpoint()
                        print(line, file=tell, flush=True)
            every = [(start, length) for start, length in order.extents]
            stage.seal(extent.from_pairs(every), point(order.epoch))
            replica.apply(stage)


class Stager:
    """Starts such a process and gives it orders."""

    seconds = 0.0  # that the last one took

    def __init__(self, commands: Path = TOP) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stager"],
            cwd=commands,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, order: Order, crash: str = "", seconds: float | None = None) -> bool:
        """Whether its child died, at the place where it was to or after so many seconds."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([dataclasses.asdict(order), crash, seconds]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, "the stager has ended"
        status, self.seconds, errors = json.loads(line)
        assert not errors, errors
        assert status in (0, -signal.SIGKILL)
        return bool(status)

    def close(self) -> None:
        with self._process as process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its child too, should there be one


def obey(order: Order, name: str, errors: int) -> NoReturn:
    """In a child: do it, and tell what went wrong in the file `errors`."""
    os.dup2(errors, sys.stderr.fileno())
    os.environ["BLKTRACK_CRASH"] = name
    importlib.reload(crash)  # it has read another name
    try:
        match order.what:
            case "apply":
                bring(order)
            case "parts":
                bring_in_parts(order)
            case "open":
                open_replica(order).close()
            case "finish":
                finish(order.target, order.paths)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)


def serve(order: Order, name: str, seconds: float | None) -> tuple[int, float, str]:
    """How a child that obeyed has ended, after how long, and its errors."""
    with os.fdopen(os.memfd_create("errors"), "r+") as errors:
        begun = time.monotonic()
        child = os.fork()
        if not child:
            obey(order, name, errors.fileno())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        took = time.monotonic() - begun
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), took, errors.read()


def main() -> None:
    for line in sys.stdin:
        order, name, seconds = json.loads(line)
        print(json.dumps(serve(Order(**order), name, seconds)), flush=True)


if __name__ == "__main__":
    main()
