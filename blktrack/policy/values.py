"""The values of a policy's keys: each function takes what TOML gave, and refuses with a ValueError
that says what would be right."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from blktrack.errors import UsageError
from blktrack.quiesce.freeze import CAP_MOST
from blktrack.rates import DAY_MINUTES, DAYS, Rates, Window
from blktrack.ship.address import Address, is_remote
from blktrack.ship.wire.hello import LEAST_PATIENCE, MOST_PATIENCE
from blktrack.ship.wire.pace import FIXED_MOST, Setting
from blktrack.units import GRANULARITY_MOST, SECTOR, format_promise, parse_duration, parse_size

_CLOCK = re.compile(r"(\d{1,2}):(\d{2})", re.ASCII)
_JOBS_MOST = 64


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("write true or false")
    return value


def size(value: Any) -> int:
    """Bytes, at least one."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str):
        raise ValueError('write a size such as "64K" or "100M"')
    try:
        count = parse_size(text.removesuffix("/s"))
    except UsageError as error:
        raise ValueError(error.hint) from error
    if count < 1:
        raise ValueError("it must be at least 1 byte")
    return count


def granularity(value: Any) -> int:
    """What every device takes; one with larger blocks refuses it when tracking begins."""
    count = size(value)
    if count & (count - 1) or not SECTOR <= count <= GRANULARITY_MOST:
        raise ValueError('write a power of two from 512 bytes to 64 MiB, such as "64K"')
    return count


def limit(value: Any) -> int | None:
    """Bytes per second; None for "none"."""
    return None if value == "none" else size(value)


def duration(value: Any) -> float:
    """Seconds, more than none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError('write a time such as "90s", "5m" or "1h30m"')
    try:
        seconds = parse_duration(value) if isinstance(value, str) else float(value)
    except UsageError as error:
        raise ValueError(error.hint) from error
    except OverflowError as error:
        raise ValueError("write a time that a clock can tell") from error
    if not 0 < seconds < math.inf:
        raise ValueError("it must be more than 0")
    return seconds


def cap(value: Any) -> float:
    seconds = duration(value)
    if seconds > CAP_MOST:
        raise ValueError(f"a freeze may last {CAP_MOST:g} s at most")
    return seconds


def consistency(value: Any) -> str:
    if value not in ("none", "crash", "filesystem"):
        raise ValueError('write "none", "crash" or "filesystem"')
    return str(value)


def commands(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(c, str) and c.strip() for c in listed):
        raise ValueError('write a command, or a list of them: ["mydb --hold"]')
    return tuple(listed)


def jobs(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _JOBS_MOST:
        raise ValueError(f"write a number from 1 to {_JOBS_MOST}")
    return value


def device_path(value: Any) -> str:
    path = _path(value)
    if not path.startswith("/dev/"):
        raise ValueError('write the path of a block device, such as "/dev/disk/by-id/..."')
    return path


def target(value: Any) -> str:
    """As links remember it."""
    if not isinstance(value, str) or not is_remote(value):
        return _path(value, "write an absolute path, or ssh://[user@]host[:port]/path")
    try:
        return str(Address.parse(value))
    except UsageError as error:
        raise ValueError(f"{error}; {error.hint}") from error


def retry_for(value: Any) -> float:
    """Seconds; none is one attempt."""
    return 0.0 if value in (0, "0") and value is not False else duration(value)


def peer_timeout(value: Any) -> float:
    seconds = duration(value)
    if not LEAST_PATIENCE <= seconds <= MOST_PATIENCE:
        least, most = format_promise(LEAST_PATIENCE), format_promise(MOST_PATIENCE)
        raise ValueError(f"write a time from {least} to {most}")
    return seconds


def compress(value: Any) -> Setting:
    if value == "none":
        return "none"
    if value == "adapt":
        return "adapt"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= FIXED_MOST:
        raise ValueError(f'write "none", "adapt" or a level from 1 to {FIXED_MOST}')
    return value


def _path(value: Any, hint: str = "write an absolute path") -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(hint)
    return os.path.normpath(value)


def windows(value: Any) -> tuple[Window, ...]:
    """Of limits: [{days = "mon-fri", from = "08:00", to = "18:00", limit = "20M"}]."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError('write a list: [{ from = "08:00", to = "18:00", limit = "20M" }]')
    return tuple(_window(item) for item in value)


def _window(item: dict[str, Any]) -> Window:
    if unknown := set(item) - {"days", "from", "to", "limit"}:
        raise ValueError(f"a window has no key {sorted(unknown)[0]!r}: days, from, to, limit")
    if missing := {"from", "to", "limit"} - set(item):
        raise ValueError(f"a window needs {', '.join(sorted(missing))}")
    begin, end = _clock(item["from"]), _clock(item["to"])
    if begin == end % DAY_MINUTES and begin != 0:
        raise ValueError("a window must end at another time than it begins")
    if begin == DAY_MINUTES:
        raise ValueError("a window begins at 23:59 at the latest")
    return Window(_days(item.get("days", "mon-sun")), begin, end, limit(item["limit"]))


def _clock(value: Any) -> int:
    """Minutes since midnight."""
    match = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    minutes = int(match[1]) * 60 + int(match[2]) if match and int(match[2]) < 60 else -1
    if not 0 <= minutes <= DAY_MINUTES:
        raise ValueError('write a time of day, such as "08:00"')
    return minutes


def _days(value: Any) -> frozenset[int]:
    """Of "mon-fri", "sat,sun", "fri-mon"."""
    found: set[int] = set()
    for part in value.lower().replace(" ", "").split(",") if isinstance(value, str) else [""]:
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError('write days such as "mon-fri" or "sat,sun"')
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found.update(day % 7 for day in range(begin, end + 1 + 7 * (end < begin)))
    return frozenset(found)


def rates(values: dict[str, Any]) -> Rates:
    return Rates(values.get("limit"), values.get("windows", ()))
