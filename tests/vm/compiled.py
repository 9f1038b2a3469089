"""Inside machines: programs are compiled once for each kernel, as LLVM is what takes longest there.

Only in the process that asks for it: the command line, run as a program, compiles as ever.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from blktrack.bpf import compile, load
from tests.compiled import key
from tools.vm.initramfs import KEPT


def compile_once() -> None:
    """Let `load` take what another machine, or another boot, has compiled."""
    vars(load)["compile_programs"] = _kept


def _kept(text: str) -> dict[str, bytes]:
    path = Path(KEPT) / f"programs-{key(text)}"
    if not path.exists():
        found = {name: code.hex() for name, code in compile.compile_programs(text).items()}
        new = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
        new.write_text(json.dumps(found), encoding="ascii")
        new.rename(path)
    read = json.loads(path.read_text(encoding="ascii"))
    return {name: bytes.fromhex(code) for name, code in read.items()}
