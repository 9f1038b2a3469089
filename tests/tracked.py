"""Writes to a tracked device, of sectors that describe themselves."""

from __future__ import annotations

from blktrack.units import KIB
from tests import sectors
from tests.blockdev import write_direct


def write(path: str, offset: int, length: int = 4 * KIB, number: int = 1) -> None:
    write_direct(path, offset, sectors.make(offset, length, number))
