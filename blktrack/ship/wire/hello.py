"""How a connection begins: one line of plain text each way.

The keeper speaks first, so that whoever tries the connection by hand sees what it is:

    blktrack-recv protocol=1-1 version=0.1.0 host=vault
    blktrack-sync protocol=1 version=0.1.0 patience=30

The one names the oldest and the newest protocol that it speaks, the other chooses, and says after
how many seconds of silence a side is taken for dead. Words that are not known are ignored.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from blktrack import __version__
from blktrack.ship.wire.errors import ConnectionLost, NoKeeper, ProtocolError

OLDEST, NEWEST = 1, 1
PATIENCE = 30.0  # seconds
LEAST_PATIENCE, MOST_PATIENCE = 1.0, 3600.0

_KEEPER, _SOURCE = b"blktrack-recv protocol=", b"blktrack-sync protocol="
_MOST_NOISE = 64 << 10  # bytes that a login may print before
_MOST_LINE = 1 << 10
_MOST_SHOWN = 80
_NUMBER = re.compile(r"[0-9]{1,4}")
_RANGE = re.compile(r"([0-9]{1,4})-([0-9]{1,4})")

Read = Callable[[memoryview], None]
Write = Callable[[bytes], None]


@dataclass(frozen=True)
class Hello:
    """What the keeper said of itself."""

    protocol: int  # chosen
    version: str
    host: str


def announce() -> bytes:
    """The keeper's line."""
    host = "".join(c for c in platform.node() if c.isalnum() or c in ".-_") or "unknown"
    words = f"{OLDEST}-{NEWEST} version={__version__} host={host}"
    return _KEEPER + words.encode("ascii", "replace") + b"\n"


def accept(read: Read) -> float:
    """The keeper takes the source's line; the patience that it asks for. ProtocolError."""
    line = bytearray()
    _line(read, line, _MOST_LINE)
    if not line.startswith(_SOURCE) or not line.endswith(b"\n"):
        _refuse("the source", f"it begins with {_shown(line)}")
    words = _words(line)
    protocol = words.get("protocol", "")
    if not _NUMBER.fullmatch(protocol) or not OLDEST <= int(protocol) <= NEWEST:
        _refuse("the source", f"it wants protocol {protocol!r}, and {_spoken()} is spoken here")
    try:
        patience = float(words.get("patience", PATIENCE))
    except ValueError:
        patience = 0.0
    if not LEAST_PATIENCE <= patience <= MOST_PATIENCE:
        _refuse("the source", f"its patience is {words.get('patience')!r}")
    return patience


def greet(read: Read, write: Write, *, peer: str, patience: float) -> Hello:
    """The source finds the keeper's line, whatever its login prints before, and answers it.

    NoKeeper if another program speaks there, ProtocolError for a version with no protocol in
    common, ConnectionLost if nothing was said at all.
    """
    line = _keeper_line(read, peer)
    words = _words(line)
    spoken = _RANGE.fullmatch(words.get("protocol", ""))
    if not spoken:
        _refuse(peer, f"it begins with {_shown(line)}")
    oldest, newest = int(spoken[1]), int(spoken[2])
    protocol = min(newest, NEWEST)
    version = words.get("version", "unknown")
    if protocol < max(oldest, OLDEST):
        older = "this host" if oldest > NEWEST else "that host"
        _refuse(
            peer,
            f"blktrack {version} there speaks protocol {oldest} to {newest}, and {_spoken()} is"
            " spoken here",
            hint=f"upgrade blktrack on {older}",
        )
    answer = f"{protocol} version={__version__} patience={patience:g}"
    write(_SOURCE + answer.encode("ascii") + b"\n")
    return Hello(protocol, version, words.get("host", peer))


def _keeper_line(read: Read, peer: str) -> bytes:
    """The first line of a keeper. What comes before it is told where none follows."""
    noise = bytearray()
    try:
        while len(noise) < _MOST_NOISE:
            begin = len(noise)
            _line(read, noise, _MOST_NOISE)
            found = noise.find(_KEEPER, begin)  # what came before may have had no end of a line
            if found >= 0 and noise.endswith(b"\n") and len(noise) - found <= _MOST_LINE:
                return bytes(noise[found:])
    except ConnectionLost as error:
        if noise.strip():
            raise NoKeeper(peer, _shown(noise)) from error
        raise
    raise NoKeeper(peer, _shown(noise))


def _line(read: Read, line: bytearray, most: int) -> None:
    """Add to `line` up to its end, or to so many bytes: one by one, as what follows is no text."""
    byte = bytearray(1)
    while len(line) < most:
        read(memoryview(byte))
        line += byte
        if byte == b"\n":
            return


def _words(line: bytes | bytearray) -> dict[str, str]:
    parts = _printable(line.strip()).split()[1:]
    return dict(part.split("=", 1) for part in parts if "=" in part)


def _shown(text: bytes | bytearray) -> str:
    """The last that is said: a greeting comes before the reason."""
    lines = text.strip().splitlines() or [b""]
    return repr(_printable(lines[-1])[:_MOST_SHOWN])


def _printable(text: bytes | bytearray) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.decode("ascii", "replace"))


def _spoken() -> str:
    return str(OLDEST) if OLDEST == NEWEST else f"{OLDEST} to {NEWEST}"


def _refuse(peer: str, what: str, *, hint: str = "") -> NoReturn:
    raise ProtocolError(peer, what, hint=hint)
