"""How a connection begins: one line of plain text each way.

The keeper speaks first, so that whoever tries the connection by hand sees what it is:

    blktrack-recv protocol=1-1 version=0.1.0 host=vault
    blktrack-sync protocol=1 version=0.1.0 patience=30

The one names the oldest and the newest protocol that it speaks, the other chooses, and says after
how many seconds of silence a side is taken for dead. Words that are not known are ignored.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from blktrack import __version__
from blktrack.ship.wire.errors import ProtocolError

OLDEST, NEWEST = 1, 1
PATIENCE = 30.0  # seconds
LEAST_PATIENCE, MOST_PATIENCE = 1.0, 3600.0

_KEEPER, _SOURCE = b"blktrack-recv ", b"blktrack-sync "
_MOST_NOISE = 64 << 10  # bytes that a login may print before
_MOST_LINE = 1 << 10

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
    words = f"protocol={OLDEST}-{NEWEST} version={__version__} host={host}"
    return _KEEPER + words.encode("ascii", "replace") + b"\n"


def accept(read: Read) -> float:
    """The keeper takes the source's line; the patience that it asks for. ProtocolError."""
    line = _line(read, _MOST_LINE, "the source")
    if not line.startswith(_SOURCE):
        _refuse("the source", f"it begins with {_shown(line)}")
    words = _words(line)
    protocol = words.get("protocol", "")
    if not protocol.isdigit() or not OLDEST <= int(protocol) <= NEWEST:
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

    ProtocolError if another program speaks there, or a version with no protocol in common.
    """
    seen = bytearray()
    while True:
        line = _line(read, _MOST_NOISE - len(seen), peer, seen)
        if line.startswith(_KEEPER):
            break
        seen += line + b"\n"
    words = _words(line)
    oldest, _, newest = words.get("protocol", "").partition("-")
    if not oldest.isdigit() or not newest.isdigit():
        _refuse(peer, f"it begins with {_shown(line)}")
    protocol = min(int(newest), NEWEST)
    version = words.get("version", "unknown")
    if protocol < max(int(oldest), OLDEST):
        older = "this host" if int(oldest) > NEWEST else "that host"
        _refuse(
            peer,
            f"blktrack {version} there speaks protocol {oldest} to {newest}, and {_spoken()} is"
            " spoken here",
            hint=f"upgrade blktrack on {older}",
        )
    answer = f"protocol={protocol} version={__version__} patience={patience:g}"
    write(_SOURCE + answer.encode("ascii") + b"\n")
    return Hello(protocol, version, words.get("host", peer))


def _line(read: Read, most: int, peer: str, before: bytearray | None = None) -> bytes:
    """Byte by byte: what follows the line is no text."""
    line, byte = bytearray(), bytearray(1)
    while len(line) < most:
        read(memoryview(byte))
        if byte == b"\n":
            return bytes(line).rstrip(b"\r")
        line += byte
    _refuse(peer, f"it says {_shown(bytes(before or line))} instead of starting blktrack recv")


def _words(line: bytes) -> dict[str, str]:
    parts = line.decode("ascii", "replace").split()[1:]
    return dict(part.split("=", 1) for part in parts if "=" in part)


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("ascii", "replace"))


def _spoken() -> str:
    return str(OLDEST) if OLDEST == NEWEST else f"{OLDEST} to {NEWEST}"


def _refuse(peer: str, what: str, *, hint: str = "") -> NoReturn:
    raise ProtocolError(peer, what, hint=hint)
