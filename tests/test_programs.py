"""The programs in this kernel: it takes them, with room to spare for a stricter verifier."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack.bpf import abi, install, kernel, layout, libbpf, load, structs
from blktrack.bpf.programs import BY_KIND
from blktrack.config import Paths

# The kernel refuses to look at more than a million instructions (BPF_COMPLEXITY_LIMIT_INSNS).
# Kernels differ by a quarter in what they need to look at.
BUDGET = 500_000


@pytest.fixture(scope="module")
def verified() -> Iterator[dict[str, int]]:
    """Instructions that the verifier walked through, by program."""
    maps = install.make_maps()
    programs: dict[str, int] = {}
    try:
        programs = load.load(layout.PROGRAMS, maps)
        yield {
            name: libbpf.info(fd, structs.ProgramInfo).verified_insns
            for name, fd in programs.items()
        }
    finally:
        for fd in (*maps.values(), *programs.values()):
            os.close(fd)


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("name", layout.PROGRAMS)
def test_verifying_stays_within_budget(name: str, verified: dict[str, int]) -> None:
    print(f"{name}: {verified[name]} instructions verified")
    assert 0 < verified[name] < BUDGET


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BLKTRACK_ROOT", str(tmp_path))
    pins = Paths.from_environment().pins
    yield pins
    kernel.remove(pins)


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("kind", [abi.KIND_REQUEST, abi.KIND_BIO], ids=["request", "bio"])
def test_programs_attach_and_go(kind: int, pins: Path) -> None:
    with install.install(pins, kind) as first:
        programs = first.programs(kind)
        assert set(programs) == set(BY_KIND[kind])
        assert not any(program.missed for program in programs.values())
    # They stay without us, and who comes next finds the same ones.
    with install.install(pins, kind) as second:
        assert {n: p.links for n, p in second.programs(kind).items()} == {
            n: p.links for n, p in programs.items()
        }
    other = next(k for k in BY_KIND if k != kind)
    with kernel.Kernel(pins) as third, pytest.raises(kernel.Detached):
        third.programs(other)
    kernel.remove(pins)
    assert not pins.exists()
    with pytest.raises(kernel.Detached):
        kernel.Kernel(pins)
