"""The function that programs call, which the kernel is told the types of."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest

from blktrack.bpf import libbpf, load, structs
from blktrack.bpf.function import CALL, INSTRUCTION, function_of, joined, typed
from blktrack.bpf.install import make_maps
from blktrack.bpf.programs import BY_KIND

EXIT = np.array([(0x95, 0, 0, 0)], dtype=INSTRUCTION).tobytes()
TO_FUNCTION = np.array([(CALL, 0x10, 0, -1)], dtype=INSTRUCTION).tobytes()
TO_HELPER = np.array([(CALL, 0, 0, 1)], dtype=INSTRUCTION).tobytes()


def test_calls_lead_to_the_function() -> None:
    code = joined(TO_HELPER + TO_FUNCTION + TO_FUNCTION + EXIT, EXIT)
    made = np.frombuffer(code, dtype=INSTRUCTION)
    assert made["imm"].tolist() == [1, 2, 1, 0, 0]  # from the instruction that follows
    assert function_of(code) == 4
    assert struct.unpack("<IIII", typed(code))[::2] == (0, 4)


def test_a_call_of_another_function_is_refused() -> None:
    near = np.array([(CALL, 0x10, 0, 1)], dtype=INSTRUCTION).tobytes()
    with pytest.raises(ValueError, match="another function than mark_change"):
        joined(near + EXIT + EXIT, EXIT)


def test_a_program_that_calls_no_function_has_none() -> None:
    code = joined(TO_HELPER + EXIT, EXIT)
    assert code == TO_HELPER + EXIT
    assert function_of(code) == 0
    assert typed(code) == b""


@pytest.mark.needs("root", "bpf")
def test_the_function_is_verified_once() -> None:
    """Without types the least of them is 160,000 instructions to the verifier."""
    maps = make_maps()
    names = [name for names in BY_KIND.values() for name in names]
    try:
        programs = load.load(names, maps)
        looked = {
            name: libbpf.info(fd, structs.ProgramInfo).verified_insns
            for name, fd in programs.items()
        }
        for fd in programs.values():
            os.close(fd)
    finally:
        for fd in maps.values():
            os.close(fd)
    assert programs.keys() >= set(names)
    assert all(count < 100_000 for count in looked.values()), looked
