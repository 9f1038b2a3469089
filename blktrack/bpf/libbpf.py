"""The few functions of libbpf that blktrack calls, typed. Failures are OSError with errno set.

bcc depends on libbpf, so wherever bcc is installed this is too; loading it alone takes a
millisecond, where importing bcc (and LLVM with it) takes fifty.
"""

from __future__ import annotations

import ctypes as ct
import errno
import functools
import os
from pathlib import Path
from typing import Any

from blktrack.bpf.structs import MapOptions, PerfEvent, ProgramOptions
from blktrack.errors import BlktrackError

# enum bpf_map_type, bpf_prog_type, bpf_attach_type, flags: include/uapi/linux/bpf.h, stable ABI
MAP_HASH, MAP_ARRAY, MAP_PERCPU_ARRAY, MAP_ARRAY_OF_MAPS = 1, 2, 6, 12
PROG_TYPE_KPROBE, PROG_TYPE_TRACING, TRACE_RAW_TP, PERF_EVENT = 2, 26, 23, 41
F_MMAPABLE, F_INNER_MAP = 1 << 10, 1 << 12
ANY, NOEXIST = 0, 1
STATS_RUN_TIME = 0
_FUNCTION = 8  # bytes of struct bpf_func_info
_BATCH = 4096  # entries of a hash asked for at once

# Where the kernel has probes: its number for them.
PROBES = Path("/sys/bus/event_source/devices/kprobe/type")
_PERF_EVENT_OPEN, _CLOSE_ON_EXEC = {"x86_64": 298, "aarch64": 241}, 8
SONAME = "libbpf.so.1"


@functools.cache
def library() -> ct.CDLL:
    """BlktrackError where libbpf is not installed."""
    try:
        lib = ct.CDLL(SONAME, use_errno=True)
    except OSError as error:
        raise BlktrackError(
            f"libbpf is not installed, which tracks: {error}", hint="apt-get install python3-bpfcc"
        ) from error
    lib.libbpf_set_print(None)  # its messages would go to standard error
    return lib


def call(name: str, *arguments: Any) -> int:
    """Call a function that returns a negative errno on failure."""
    result = int(getattr(library(), name)(*arguments))
    if result < 0:
        code = ct.get_errno() or -result
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def create_map(
    kind: int, name: str, key: int, value: int, entries: int, *, flags: int = 0, inner: int = 0
) -> int:
    options = MapOptions(sz=ct.sizeof(MapOptions), map_flags=flags, inner_map_fd=inner)
    return call("bpf_map_create", kind, name.encode(), key, value, entries, ct.byref(options))


def lookup(fd: int, key: bytes, size: int) -> bytes | None:
    """The value of a key; for a map of maps the inner map's id. None if there is none."""
    value = ct.create_string_buffer(size)
    try:
        call("bpf_map_lookup_elem", fd, key, value)
    except FileNotFoundError:
        return None
    return value.raw


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    call("bpf_map_update_elem", fd, key, value, ct.c_uint64(flags))


def delete(fd: int, key: bytes) -> None:
    """Deleting what is not there is not an error."""
    try:
        call("bpf_map_delete_elem", fd, key)
    except FileNotFoundError:
        return


def values(fd: int, key: int, value: int) -> bytes:
    """All values of a hash, one after the other. Each bucket is read at an instant of its own, so
    an entry that is there all the time is never missed (BPF_MAP_LOOKUP_BATCH)."""
    room = _BATCH
    found: list[bytes] = []
    cursor, following = None, ct.create_string_buffer(max(key, 4))
    while True:
        keys, data = ct.create_string_buffer(room * key), ct.create_string_buffer(room * value)
        count = ct.c_uint32(room)
        arguments = (fd, cursor, following, keys, data, ct.byref(count), None)
        try:
            call("bpf_map_lookup_batch", *arguments)
        except FileNotFoundError:  # that was the last of it
            return b"".join([*found, data.raw[: count.value * value]])
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room *= 2  # a bucket has more entries than there is room for
            continue
        found.append(data.raw[: count.value * value])
        cursor = ct.create_string_buffer(following.raw, len(following))


def load_btf(types: bytes) -> int:
    return call("bpf_btf_load", types, ct.c_size_t(len(types)), None)


def load_program(
    name: str, code: bytes, target: int, types: int = 0, functions: bytes = b""
) -> int:
    """Load a typed raw tracepoint program; `target` is the BTF id of its `btf_trace_*` typedef.

    0 for the program of a probe. types, functions -- BTF, and struct bpf_func_info of each of
    several functions. ValueError with the end of the verifier's log when the kernel refuses it.
    """
    log = ct.create_string_buffer(1 << 20)
    options = ProgramOptions(
        sz=ct.sizeof(ProgramOptions),
        expected_attach_type=TRACE_RAW_TP if target else 0,
        attach_btf_id=target,
        prog_btf_fd=types,
        func_info=ct.cast(ct.c_char_p(functions), ct.c_void_p),
        func_info_cnt=len(functions) // _FUNCTION,
        func_info_rec_size=_FUNCTION if functions else 0,
        log_size=len(log),
        log_buf=ct.cast(log, ct.c_char_p),
    )
    try:
        return call(
            "bpf_prog_load",
            PROG_TYPE_TRACING if target else PROG_TYPE_KPROBE,
            name.encode()[:15],
            b"Dual BSD/GPL",
            code,
            ct.c_size_t(len(code) // 8),
            ct.byref(options),
        )
    except OSError as error:
        if not log.value:
            raise
        tail = log.value.decode(errors="replace").strip().splitlines()[-12:]
        raise ValueError(f"{name}: {error.strerror}\n" + "\n".join(tail)) from error


def attach(program: int) -> int:
    """A link that keeps the program attached while it is open or pinned."""
    return call("bpf_raw_tracepoint_open", None, program)


def attach_probe(program: int, function: str) -> int:
    """As `attach`, where a function of the kernel is called. OSError if it takes no probes."""
    name = ct.create_string_buffer(function.encode())
    event = PerfEvent(
        type=int(PROBES.read_text(encoding="ascii")),
        size=ct.sizeof(PerfEvent),
        function=ct.cast(name, ct.c_void_p),
    )
    libc = ct.CDLL(None, use_errno=True)
    # Of no task, on the first processor: programs are run for all of them nevertheless.
    words = (_PERF_EVENT_OPEN[os.uname().machine], ct.byref(event), -1, 0, -1, _CLOSE_ON_EXEC)
    if (fd := libc.syscall(*words)) < 0:
        raise OSError(ct.get_errno(), f"{function}: {os.strerror(ct.get_errno())}")
    try:
        return call("bpf_link_create", program, fd, PERF_EVENT, None)
    finally:
        os.close(fd)


def pin(fd: int, path: Path) -> None:
    call("bpf_obj_pin", fd, os.fsencode(path))


def open_pin(path: Path | str) -> int:
    """FileNotFoundError if nothing is pinned there."""
    return call("bpf_obj_get", os.fsencode(path))


def program_by_id(number: int) -> int:
    return call("bpf_prog_get_fd_by_id", ct.c_uint32(number))


def info(fd: int, kind: type[ct.Structure]) -> Any:
    """ProgramInfo, LinkInfo or MapInfo of an open object."""
    value = kind()
    size = ct.c_uint32(ct.sizeof(kind))
    call("bpf_obj_get_info_by_fd", fd, ct.byref(value), ct.byref(size))
    return value


def enable_stats() -> int:
    """Have the kernel count and time the runs of all programs while this is open (Linux 5.8)."""
    return call("bpf_enable_stats", STATS_RUN_TIME)


def mount(kind: str, where: Path) -> None:
    """mount(2) of a file system without a device."""
    libc = ct.CDLL(None, use_errno=True)
    if libc.mount(kind.encode(), os.fsencode(where), kind.encode(), ct.c_ulong(0), None):
        raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))
