"""C to BPF instructions, by bcc, for the running kernel."""

from __future__ import annotations

import ctypes as ct
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blktrack.bpf import abi
from blktrack.bpf.function import CALL, FUNCTION, INSTRUCTION, joined
from blktrack.bpf.layout import PROGRAMS
from blktrack.errors import BlktrackError

_HERE = Path(__file__).parent
_HEADERS = _HERE / "headers"  # stands in for the kernel headers that bcc looks for


_LOAD = 0x18  # BPF_LD | BPF_IMM | BPF_DW: of 64 bits, in two instructions
_OF_MAP = (1, 2)  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE: what a source register then stands for
_OF_KERNEL = 2  # BPF_PSEUDO_KFUNC_CALL: a call is of a function by BTF id
_CAST = 1 << 24  # in the text, bpf_rdonly_cast: no helper has such a number


def source(facts: Mapping[str, int | str]) -> str:
    """The program text: shared structs, kernel facts, a number for each of MAPS, `track.c`."""
    facts = {**facts, "CAST": _CAST}
    defines = "".join(f"#define {name} {value}\n" for name, value in facts.items())
    defines += "".join(f"#define MAP_{name.upper()} {n}\n" for n, name in enumerate(abi.MAPS))
    return f"{abi.c_header()}{defines}{(_HERE / 'track.c').read_text()}"


def linked(code: bytes, maps: Mapping[str, int], cast: int = 0) -> bytes:
    """Instructions with what this kernel has for the numbers of `source`.

    maps -- descriptors by name; cast -- the BTF id of bpf_rdonly_cast, where probes need it
    """
    made = np.frombuffer(code, dtype=INSTRUCTION).copy()
    named = (made["code"] == _LOAD) & np.isin(made["registers"] >> 4, _OF_MAP)
    made["imm"][named] = np.array([maps[name] for name in abi.MAPS])[made["imm"][named]]
    called = (made["code"] == CALL) & (made["imm"] == _CAST)
    made["registers"][called] = _OF_KERNEL << 4
    made["imm"][called] = cast
    return made.tobytes()


def fingerprint() -> str:
    """Names program text and shared structs: programs and maps of another do not fit."""
    files = _HERE / "track.c", _HERE / "track.h"
    return _digest(*((file, file.stat().st_mtime_ns) for file in files))


@functools.cache  # asked for whenever maps are opened
def _digest(main: tuple[Path, int], header: tuple[Path, int]) -> str:
    """Of these files, each as it was last changed."""
    text = source({}) + header[0].read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def import_bcc() -> tuple[type[Any], Any]:
    """bcc's BPF class and its C library. ImportError where bcc is missing."""
    os.environ["BCC_KERNEL_SOURCE"] = str(_HEADERS)
    from bcc import BPF  # loads LLVM; only `track` compiles
    from bcc.libbcc import lib

    return BPF, lib


def compile_programs(text: str) -> dict[str, bytes]:
    """Instructions of every program, with the function it calls, for `linked`. BlktrackError if bcc
    fails."""
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
    code = {}
    for name in (*PROGRAMS, FUNCTION):
        start = lib.bpf_function_start(module.module, name.encode())
        size = lib.bpf_function_size(module.module, name.encode())
        code[name] = ct.string_at(start, size) if start else b""
    module.cleanup()
    return {name: joined(code[name], code[FUNCTION]) for name in PROGRAMS}
