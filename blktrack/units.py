"""Sizes, rates and durations as people write and read them."""

from __future__ import annotations

import re

from blktrack.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
SECTOR = 512  # the kernel's unit in every block-layer event, whatever the device's block size
GRANULARITY_MOST = 64 * MIB  # bytes per dirty bit

_SUFFIXES = "KMGTPE"
_SIZE = re.compile(r"(\d{1,20})(?:\.(\d{1,20}))?\s*([KMGTPE]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(
    "".join(rf"(\d{{1,10}}(\.\d{{1,9}})?\s*{unit}\s*)?" for unit in _SECONDS),
    re.IGNORECASE | re.ASCII,
)


def parse_size(text: str) -> int:
    """Bytes of `4096`, `64K`, `64KiB`, `1.5G`: suffixes are powers of 1024. Else UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", hint="write a number of bytes, or 64K, 4M, 1G")
    whole, fraction, suffix = match.groups(default="")
    power = _SUFFIXES.index(suffix.upper()) + 1 if suffix else 0
    scale: int = 10 ** len(fraction)
    count, rest = divmod(int(whole + fraction) << 10 * power, scale)
    if rest:
        raise UsageError(f"{text!r} is not a whole number of bytes", hint="use a smaller unit")
    return count


def format_size(count: float) -> str:
    """`0 B`, `1.5 KiB`, `23 MiB`: three significant digits at most."""
    if abs(count) < 1024:
        return f"{int(count)} B"
    for suffix in _SUFFIXES:
        count /= 1024
        if abs(count) < 999.5 or suffix == _SUFFIXES[-1]:
            digits = 2 if abs(count) < 10 else 1 if abs(count) < 100 else 0
            text = f"{count:.{digits}f}"
            return f"{text.rstrip('0').rstrip('.') if digits else text} {suffix}iB"
    raise AssertionError("unreachable")


def format_rate(count: float, seconds: float) -> str:
    """Bytes per second over `seconds`."""
    return f"{format_size(count / seconds)}/s" if seconds > 0 else "-"


def format_duration(seconds: float) -> str:
    """`0.25 s`, `12.3 s`, `3:05`, `2:03:05`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def format_promise(seconds: float) -> str:
    """As a policy says it and `parse_duration` reads it: `90s` is `1m30s`, `36h` is `1d12h`."""
    whole, text = int(seconds), ""
    for unit in "dhm":
        count, whole = divmod(whole, _SECONDS[unit])
        text += f"{count}{unit}" * bool(count)
    rest = round(whole + seconds % 1, 3)
    return f"{text}{rest:g}s" if rest or not text else text


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `1.5h`, `1h30m`, `2d`, `1w`. Else UsageError."""
    stripped = text.strip()
    if re.fullmatch(r"\d{1,10}(\.\d{1,9})?", stripped, re.ASCII):
        return float(stripped)
    if not stripped or not _DURATION.fullmatch(stripped):
        raise UsageError(
            f"{text!r} is not a duration",
            hint="write a number of seconds, or 90s, 5m, 1h30m, 1d",
        )
    parts = re.findall(r"([\d.]+)\s*([a-z])", stripped.lower())
    return sum(float(count) * _SECONDS[unit] for count, unit in parts)
