"""Loading and attaching the programs, each with its copies where it needs them (layout.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from blktrack.bpf import function, layout, libbpf, structs
from blktrack.bpf.btf import Btf
from blktrack.bpf.compile import compile_programs, linked, source
from blktrack.bpf.programs import copies_of
from blktrack.errors import BlktrackError

_PROBES = {probe for probe, _ in layout.PROBES.values()}


class _NoProbes(Exception):
    """The kernel refuses them, as when it is locked down."""


def load(names: Iterable[str], maps: Mapping[str, int], *, probes: bool = True) -> dict[str, int]:
    """Compile and load programs for the running kernel: descriptors by the name of their pin."""
    btf = Btf()
    loaded: dict[str, int] = {}
    types = -1
    try:
        types = libbpf.load_btf(function.types())
        compiled = compile_programs(source(layout.constants(btf)))
        cast = layout.cast(btf)
        code = {name: linked(each, maps, cast) for name, each in compiled.items()}
        for name in names:
            target = btf.tracepoint(layout.PROGRAMS[name])
            first, copies = name, layout.COPIES.get(name, ())
            if not layout.preemptible(btf):
                copies = ()
            elif cast and probes and name in layout.PROBES:
                first, _ = layout.PROBES[name]
            for pinned, text in zip(copies_of(name), (first, *copies), strict=False):
                at = 0 if text in _PROBES else target
                loaded[pinned] = libbpf.load_program(
                    text, code[text], at, types, function.typed(code[text])
                )
    except (OSError, ValueError) as error:
        for fd in loaded.values():
            os.close(fd)
        raise BlktrackError(
            f"the kernel refused a tracking program: {error}", hint="run blktrack doctor"
        ) from error
    finally:
        btf.close()
        if types >= 0:
            os.close(types)
    return loaded


def attached(names: Iterable[str], maps: Mapping[str, int]) -> dict[str, int]:
    """Descriptors of links, by the name of their pin and in the order of attaching."""
    names = tuple(names)
    try:
        return _attached(load(names, maps))
    except _NoProbes:  # copies alone have to do
        return _attached(load(names, maps, probes=False))


def _attached(programs: Mapping[str, int]) -> dict[str, int]:
    """Attach and close programs."""
    links: dict[str, int] = {}
    try:
        for name, program in programs.items():
            if libbpf.info(program, structs.ProgramInfo).type == libbpf.PROG_TYPE_KPROBE:
                links[name] = _probed(program, layout.PROBES[name][1])
            else:
                links[name] = libbpf.attach(program)
    except BaseException:
        for fd in links.values():
            os.close(fd)
        raise
    finally:
        for fd in programs.values():
            os.close(fd)
    return links


def _probed(program: int, function: str) -> int:
    try:
        return libbpf.attach_probe(program, function)
    except OSError as error:
        raise _NoProbes(str(error)) from error
