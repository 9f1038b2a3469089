"""The maps that the kernel programs and Python share: one description, two languages.

The dtypes below are the only definition of each struct; `c_header` writes them as C for the
compiler, so that the two sides cannot drift apart.
"""

from __future__ import annotations

import numpy as np

SLOTS = 64  # tracked devices at once
LEVELS = 4  # radix-64 levels of a plane, see `track.h`
# The shared ones; programs number them so.
MAPS = ("windows", "planes", "stats", "inflight", "seen", "caught")
INFLIGHT = 65536  # bios of bio-based devices between queue and completion
SEEN = 16384  # changes that begin just now, between the first copy of a program and the last
MAX_RANGES = 256  # (discard range, slot) pairs of one request; more would be too much to verify
MAX_SPLITS = 4  # times that a bio is split and its part split again

# Which events show a device's changes. `caught` has a u64 for each, `seen` a u32 for each address.
KIND_REQUEST, KIND_BIO = 0, 1

# Planes of one inner map, in this order.
SUBMITTED, COMPLETED = 0, 1

WINDOW = np.dtype(
    [
        ("start", "u8"),  # first sector of the tracked range, counted on its whole disk
        ("end", "u8"),  # one past its last sector
        ("shift", "u4"),  # granule = (sector - start) >> shift
        ("whole", "u4"),  # 1: a whole disk, on which nothing lies beyond `end`
        ("level", "u4", (LEVELS,)),  # first word of each level within a plane
        ("plane_words", "u4"),  # words of a plane
        ("first", "u4"),  # lowest slot on the same disk
        ("next", "u4"),  # next higher slot on the same disk, SLOTS after the last
        ("settled", "u4"),  # 1: whatever is in flight was seen to begin
    ],
    align=True,
)

# Writer: user space. Reader: every program. `dev[kind][slot]` is the whole disk of that slot's
# window, as `disk_number`, and is set last; 0 is a free slot. `count[kind]` bounds the search.
WINDOWS = np.dtype(
    [("count", "u4", (2,)), ("dev", "u4", (2, SLOTS)), ("window", WINDOW, (SLOTS,))], align=True
)

# Writer: the programs, one copy for each CPU. Reader: user space. Never reset while attached.
STATS = np.dtype(
    [
        ("begun", "u8"),  # bytes of all changes of the whole disk that were seen to begin
        ("ended", "u8"),  # and to end
        ("writes", "u8"),  # changes completed
        ("written", "u8"),  # and their bytes
        ("opaque", "u8"),  # pass-through or unknown operation that may have changed anything
        ("beyond", "u8"),  # change beyond the end that the disk had when tracking began
        ("full", "u8"),  # bio not remembered: its completion cannot be marked
        ("overflow", "u8"),  # request with more ranges than a program may walk
        ("unbegun", "u8"),  # bio that ended and was not seen to begin, once `settled`
        ("early", "u8"),  # no loss: the same before that
        ("late", "u8"),  # no loss: remembered bio, seen to have completed only afterwards
    ],
    align=True,
)

# Writer: the bio programs; an entry lives from queue to completion. Full: counted as `full`.
BIO = np.dtype([("sector", "u8"), ("bytes", "u4"), ("dev", "u4"), ("op", "u4"), ("pad", "u4")])

# What a program hands to the function that marks (function.py): sectors that begin or end to
# change, counted on the whole disk of that slot's window.
CHANGE = np.dtype([("slot", "u4"), ("plane", "u4"), ("sector", "u8"), ("sectors", "u8")])

_C_TYPES = {"u4": "u32", "u8": "u64"}


def disk_number(major: int, minor: int) -> int:
    """A whole disk as the programs compute it; the kernel's own dev_t has the same shape."""
    return major << 20 | minor


def _c_struct(name: str, dtype: np.dtype[np.void]) -> str:
    assert dtype.fields is not None
    lines = []
    for field in dtype.names or ():
        kind = dtype.fields[field][0]
        base, shape = kind.base, kind.shape
        c_type = "struct window" if base.names else _C_TYPES[base.str[1:]]
        lines.append(f"\t{c_type} {field}{''.join(f'[{n}]' for n in shape)};")
    return f"struct {name} {{\n" + "\n".join(lines) + "\n};\n"


def c_header() -> str:
    """The structs and constants as C, with their sizes asserted."""
    structs = {
        "window": WINDOW,
        "windows": WINDOWS,
        "stats": STATS,
        "bio_range": BIO,
        "change": CHANGE,
    }
    constants = {
        "SLOTS": SLOTS,
        "LEVELS": LEVELS,
        "MAX_RANGES": MAX_RANGES,
        "MAX_SPLITS": MAX_SPLITS,
        "KIND_REQUEST": KIND_REQUEST,
        "KIND_BIO": KIND_BIO,
        "SUBMITTED": SUBMITTED,
        "COMPLETED": COMPLETED,
    }
    text = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    for name, dtype in structs.items():
        text += _c_struct(name, dtype)
        text += f'_Static_assert(sizeof(struct {name}) == {dtype.itemsize}, "{name}");\n'
    return text
