"""C to BPF instructions, by bcc, for the running kernel."""

from __future__ import annotations

import ctypes as ct
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blktrack.bpf import abi
from blktrack.bpf.layout import PROGRAMS
from blktrack.errors import BlktrackError

_HERE = Path(__file__).parent
_HEADERS = _HERE / "headers"  # stands in for the kernel headers that bcc looks for


def source(facts: Mapping[str, int | str], maps: Mapping[str, int]) -> str:
    """The program text: shared structs, kernel facts, map descriptors, `track.c`."""
    defines = "".join(f"#define {name} {value}\n" for name, value in facts.items())
    defines += "".join(f"#define FD_{name.upper()} {fd}\n" for name, fd in maps.items())
    return f"{abi.c_header()}{defines}{(_HERE / 'track.c').read_text()}"


def fingerprint() -> str:
    """Names program text and shared structs: programs and maps of another do not fit."""
    text = source({}, {}) + (_HERE / "track.h").read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def import_bcc() -> tuple[type[Any], Any]:
    """bcc's BPF class and its C library. ImportError where bcc is missing."""
    os.environ["BCC_KERNEL_SOURCE"] = str(_HEADERS)
    from bcc import BPF  # loads LLVM; only `track` compiles
    from bcc.libbcc import lib

    return BPF, lib


def compile_programs(text: str) -> dict[str, bytes]:
    """Instructions of every program, for `libbpf.load_program`. BlktrackError if bcc fails."""
    try:
        bpf, lib = import_bcc()
    except ImportError as error:
        raise BlktrackError(
            "bcc's Python module is not installed", hint="apt-get install python3-bpfcc"
        ) from error
    try:
        module = bpf(text=text.encode(), cflags=[f"-I{_HERE}", "-Wno-unused-function"])
    except Exception as error:  # bcc raises the bare class; its own messages are on standard error
        raise BlktrackError(
            f"bcc cannot compile the tracking programs: {error}",
            hint="its own messages are above; blktrack doctor tells what this host lacks",
        ) from error
    programs = {}
    for name in PROGRAMS:
        start = lib.bpf_function_start(module.module, name.encode())
        size = lib.bpf_function_size(module.module, name.encode())
        programs[name] = ct.string_at(start, size)
    module.cleanup()
    return programs
