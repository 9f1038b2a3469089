"""JSON from elsewhere, of which each value is checked when it is taken.

What comes from here may be printed, compared and put into a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Self

from blktrack.errors import BlktrackError
from blktrack.point import Point

MAX_NUMBER = 2**63 - 1
MAX_TEXT = 4096  # characters
MAX_TIME = 253402300799  # the last second of the year 9999
LEVELS = ("none", "crash", "filesystem")

_MOST_SAID = MAX_TEXT // 2
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Fields:
    """A JSON object. `wrong` makes the error of a clause that says what is wrong with it."""

    def __init__(
        self, value: dict[str, Any], where: str, wrong: Callable[[str], BlktrackError]
    ) -> None:
        self._value = value
        self._where = where
        self._wrong = wrong

    @classmethod
    def parse(cls, raw: bytes, where: str, wrong: Callable[[str], BlktrackError]) -> Self:
        try:
            # Not json.loads(raw): that would take UTF-16 and UTF-32 too.
            value = json.loads(
                raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
            )
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise wrong(f"its {where} is not a JSON object in UTF-8 with unique keys")
        return cls(value, where, wrong)

    def get(self, key: str) -> object:
        if key not in self._value:
            raise self._wrong(f"its {self._where} has no {key!r}")
        value: object = self._value[key]
        return value

    def has(self, key: str) -> bool:
        """Whether there is a value, and not null."""
        return self._value.get(key) is not None

    def refuse(self, key: str) -> NoReturn:
        raise self._wrong(f"its {self._where} has a bad {key!r}")

    def inner(self, key: str) -> Self:
        value = self.get(key)
        if not isinstance(value, dict):
            self.refuse(key)
        return type(self)(value, f"{self._where}'s {key}", self._wrong)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or len(value) > MAX_TEXT or _UNPRINTABLE.search(value):
            self.refuse(key)
        return value

    def uuid(self, key: str) -> str:
        value = self.text(key)
        if not _UUID.fullmatch(value):
            self.refuse(key)
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            self.refuse(key)
        return value

    def number(self, key: str, low: int = 0, high: int = MAX_NUMBER) -> int:
        value = self.get(key)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key)
        return value

    def time(self, key: str) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not isinstance(value, int | float):
            self.refuse(key)
        if not 0 <= value <= MAX_TIME:  # what json makes of 1e999 is not
            self.refuse(key)
        return float(value)

    def point(self, key: str) -> Point:
        fields = self.inner(key)
        level = fields.text("consistency")
        if level not in LEVELS:
            fields.refuse("consistency")
        return Point(fields.number("epoch"), fields.text("generation"), fields.time("time"), level)


def sayable(text: str) -> str:
    """What another host takes for a text: in one line, and not too long."""
    line, half = _UNPRINTABLE.sub("?", " ".join(text.split())), _MOST_SAID // 2
    return line if len(line) <= _MOST_SAID else f"{line[:half]} ... {line[-half:]}"


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError("a key is there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
