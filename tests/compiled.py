"""In the process of the tests, programs are compiled once for each text: LLVM takes a second.

Commands, run as programs, compile as ever.
"""

from __future__ import annotations

import hashlib
import os

from blktrack.bpf import compile, load


def key(text: str) -> str:
    """Names what is compiled: text, headers, kernel."""
    headers = (path.read_bytes() for path in sorted(compile._HERE.rglob("*.h")))
    parts = [os.uname().release.encode(), text.encode(), *headers]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def compile_once() -> None:
    """Let `load` take what was compiled before."""
    kept: dict[str, dict[str, bytes]] = {}

    def compiled(text: str) -> dict[str, bytes]:
        if (name := key(text)) not in kept:
            kept[name] = compile.compile_programs(text)
        return kept[name]

    vars(load)["compile_programs"] = compiled
