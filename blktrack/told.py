"""What the operator was told already, so that a schedule says it once and not with every run.

    LIB/told.json    by what it was about: the exit code, the words, when they were told last

It is only ever advice: what cannot be read or written is told once more. Numbers in the words, as
of bytes or seconds, do not count: they differ each time.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blktrack import durable
from blktrack.config import Paths
from blktrack.errors import BlktrackError, Busy

_FORMAT = 1
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Trouble:
    """What there is to tell of one thing."""

    exit: int
    words: str


class Told:
    """Says again what goes on only after `remind` seconds."""

    def __init__(self, paths: Paths, remind: float, clock: Callable[[], float] = time.time) -> None:
        self._path, self._lock = paths.lib / "told.json", paths.run / "told.lock"
        self._remind, self._clock = remind, clock

    def is_news(self, troubles: Mapping[str, Trouble]) -> bool:
        """Whether any of these was not told yet, changed, or was told too long ago."""
        known = self._read()
        return any(self._is_due(known.get(what), found) for what, found in troubles.items())

    def record(
        self, troubles: Mapping[str, Trouble], looked: Collection[str], *, told: bool
    ) -> None:
        """Remember these, if they were told now, and forget the others that were looked at.

        A thing that was busy may be busy again in the next run but one: that is not news then.
        """
        with contextlib.suppress(BlktrackError), durable.lock(self._lock, what="", wait=5):
            before = self._read()
            known = {
                what: entry
                for what, entry in before.items()
                if what in troubles or what not in looked or entry.get("exit") == Busy.exit_code
            }
            if told:
                now = self._clock()
                known |= {what: asdict(t) | {"time": now} for what, t in troubles.items()}
            if known != before:
                durable.write_json(self._path, {"format": _FORMAT, "told": known})

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(BlktrackError):
            raw = durable.read_json(self._path)
            told = raw.get("told") if raw and raw.get("format") == _FORMAT else None
            if isinstance(told, dict) and all(isinstance(entry, dict) for entry in told.values()):
                return told
        return {}

    def _is_due(self, entry: dict[str, Any] | None, found: Trouble) -> bool:
        if entry is None or entry.get("exit") != found.exit:
            return True
        if _bare(str(entry.get("words"))) != _bare(found.words):
            return True
        when = entry.get("time")
        # A clock that was set back must not silence anything.
        return not isinstance(when, (int, float)) or not 0 <= self._clock() - when < self._remind


def _bare(words: str) -> str:
    return _NUMBER.sub("#", words)
