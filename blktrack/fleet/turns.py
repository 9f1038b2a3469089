"""Which run of `sync --all` has which replicas, and how many devices all of them work on at a time.

    RUN/all/LINK.lock      held by the run that is going to sync this link, or is doing it
    RUN/all/slot-N         held while a run works on a device; N is below the number of jobs

A run takes every link that no other run has before it begins, and lets go of each as it ends. While
one is hours into a first copy, the next ones so keep all other replicas as young as was promised,
and the host has no more to do than it was asked for. A death lets go of both; the content of a lock
is for the words of others.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from blktrack import durable
from blktrack.errors import Busy

FOLDER = "all"  # below RUN


@dataclass
class Turns:
    """Those of one run."""

    run: Path
    slots: int
    _links: dict[str, contextlib.ExitStack] = field(default_factory=dict)

    def take(self, link: str) -> str:
        """Have a link; why not, if another run has it."""
        path = self.run / FOLDER / f"{quote(link, safe='')}.lock"
        held = _lock(path)
        if held is None:
            return _held_by(path)
        path.write_text(json.dumps({"pid": os.getpid(), "time": time.time()}), encoding="ascii")
        self._links[link] = held
        return ""

    def let_go(self, link: str) -> None:
        if held := self._links.pop(link, None):
            held.close()

    def slot(self) -> contextlib.ExitStack | None:
        """The right to work on a device until it is closed; None if all are in use."""
        paths = (self.run / FOLDER / f"slot-{number}" for number in range(self.slots))
        return next((held for path in paths if (held := _lock(path))), None)

    def close(self) -> None:
        for link in list(self._links):
            self.let_go(link)


def _lock(path: Path) -> contextlib.ExitStack | None:
    held = contextlib.ExitStack()
    try:
        held.enter_context(durable.lock(path, what="sync --all"))
    except Busy:
        return None
    return held


def _held_by(path: Path) -> str:
    """Who has it since when, as far as that can be read."""
    words = "the last sync --all has not ended yet"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        raw = json.loads(path.read_text(encoding="ascii"))
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(raw["time"]))
        words += f": process {int(raw['pid'])} since {when}"
    return words
