"""The state files for who looks at them again and again: parsed only where they were replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from blktrack.state import DeviceState, Epoch, LinkState, Store

T = TypeVar("T")

# A file as young as this may be replaced within one tick of the clock that stamps it.
_SETTLED = 0.1


class Records:
    """Nothing here takes a lock: each file is replaced in one step, so that it is whole.

    BlktrackError for one that is damaged, of another format or unreadable.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lib = f"{store.paths.lib}/devices"
        self._run = f"{store.paths.run}/devices"
        self._known: dict[str, tuple[tuple[int, int, int], Any]] = {}

    def devices(self) -> list[str]:
        """Ids, ascending."""
        return _names(self._lib)

    def device(self, device: str) -> DeviceState | None:
        path = f"{self._lib}/{device}/device.json"
        return self._read(path, lambda: self.store.device(device))

    def epoch(self, device: str) -> Epoch | None:
        path = f"{self._run}/{device}/epoch.json"
        return self._read(path, lambda: self.store.epoch(device))

    def links(self, device: str) -> list[LinkState]:
        folder = f"{self._lib}/{device}/links"
        names = [name for name in _names(folder) if name.endswith(".json") and name[0] != "."]
        found = [self._link(f"{folder}/{name}") for name in names]
        return [link for link in found if link is not None]

    def _link(self, path: str) -> LinkState | None:
        return self._read(path, lambda: self.store.link(Path(path)))

    def _read(self, path: str, load: Callable[[], T | None]) -> T | None:
        try:
            info = os.stat(path)
        except OSError:
            self._known.pop(path, None)
            return None
        stamp = (info.st_ino, info.st_mtime_ns, info.st_size)
        if (known := self._known.get(path)) and known[0] == stamp:
            found: T | None = known[1]
            return found
        value = load()
        if time.time() - info.st_mtime > _SETTLED:
            self._known[path] = (stamp, value)
        return value


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
