"""The function that programs call to mark a change, and its types.

What the kernel's verifier is told to be a global function it verifies once in each program, for all
arguments of its types (51c39bb1d5d1). Without types it goes through a function again from each call
and each state that leads there: of a program it then looks at 160 to 440 thousand instructions in
place of 20 to 50 thousand.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from blktrack.bpf import abi

FUNCTION = "mark_change"
# struct bpf_insn (include/uapi/linux/bpf.h).
INSTRUCTION = np.dtype([("code", "u1"), ("registers", "u1"), ("offset", "<i2"), ("imm", "<i4")])
CALL = 0x85  # BPF_JMP | BPF_CALL
_LOCAL = 1  # BPF_PSEUDO_CALL: of a function as far from the next instruction as `imm` says
_UNKNOWN = -1  # how far the compiler says it is to one in another section

# enum BTF_KIND_* (include/uapi/linux/btf.h).
_INT, _POINTER, _STRUCT, _FUNCTION, _PROTOTYPE = 1, 2, 4, 12, 13
_GLOBAL = 1  # BTF_FUNC_GLOBAL
_FUNCTION_ID, _PROGRAM_ID = 5, 8  # types are numbered from 1, as `types` lists them


def joined(code: bytes, function: bytes) -> bytes:
    """A program with the function behind it and its calls, of which the compiler knows no target,
    made calls of that. As it is if it calls none. ValueError if it calls another."""
    made = np.frombuffer(code + function, dtype=INSTRUCTION).copy()
    calls = _calls(made)
    if not len(calls):
        return code
    if (made["imm"][calls] != _UNKNOWN).any():
        raise ValueError(f"a program calls another function than {FUNCTION}")
    made["imm"][calls] = len(code) // INSTRUCTION.itemsize - calls - 1
    return made.tobytes()


def function_of(code: bytes) -> int:
    """The instruction at which the function of a program begins; 0 if it has none."""
    made = np.frombuffer(code, dtype=INSTRUCTION)
    calls = _calls(made)
    return int(made["imm"][calls[0]] + calls[0] + 1) if len(calls) else 0


def _calls(code: NDArray[np.void]) -> NDArray[np.intp]:
    return np.flatnonzero((code["code"] == CALL) & (code["registers"] >> 4 == _LOCAL))


def typed(code: bytes) -> bytes:
    """struct bpf_func_info of a program and its function, by their ids in `types`; none if it has
    no function."""
    at = function_of(code)
    return struct.pack("<IIII", 0, _PROGRAM_ID, at, _FUNCTION_ID) if at else b""


def types() -> bytes:
    """BTF. Of the program itself the kernel knows what it gets."""
    names = b"\0"

    def name(text: str) -> int:
        nonlocal names
        names += text.encode() + b"\0"
        return len(names) - len(text) - 1

    def kind(text: str, number: int, rest: int, count: int = 0) -> bytes:
        return struct.pack("<III", name(text) if text else 0, number << 24 | count, rest)

    found = [
        kind("int", _INT, 4) + struct.pack("<I", 1 << 24 | 32),  # signed, 32 bits
        kind("change", _STRUCT, abi.CHANGE.itemsize),  # all that matters is how large it is
        kind("", _POINTER, 2),
        kind("", _PROTOTYPE, 1, 1) + struct.pack("<II", name("change"), 3),
        kind(FUNCTION, _FUNCTION, 4, _GLOBAL),
        kind("", _POINTER, 0),
        kind("", _PROTOTYPE, 1, 1) + struct.pack("<II", name("context"), 6),
        kind("program", _FUNCTION, 7, _GLOBAL),
    ]
    data = b"".join(found)
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(data), len(data), len(names))
    return header + data + names
