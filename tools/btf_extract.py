#!/usr/bin/env python3
"""Cut a kernel's BTF down to the types that blktrack reads, for tests/data/btf.

    python -m tools.btf_extract SOURCE OUTPUT

SOURCE is a vmlinuz (x86), a vmlinux, or raw BTF such as /sys/kernel/btf/vmlinux. Of the types named
below every member is kept; what they point to becomes a forward declaration, and what they embed
keeps its size but not its members. Format: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import argparse
import lzma
import struct
import subprocess
import zlib
from dataclasses import dataclass, field
from pathlib import Path

STRUCTS = (
    "request",
    "bio",
    "bvec_iter",
    "request_queue",
    "gendisk",
    "block_device",
    "block_device_operations",
    "tp_transition_snapshot",
    "pt_regs",
)
ENUMS = ("req_op", "req_opf", "req_flag_bits")
TRACEPOINTS = "btf_trace_block_"
FUNCTIONS = ("bpf_rdonly_cast",)

# BTF_KIND_*
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)

# Words after a type: so many once, or so many for each of its parts.
_ONCE = {INT: 1, ARRAY: 3, VAR: 1, DECL_TAG: 1}
_EACH = {STRUCT: 3, UNION: 3, ENUM: 2, FUNC_PROTO: 2, DATASEC: 3, ENUM64: 3}
_NAMED = {STRUCT, UNION, ENUM, FUNC_PROTO, ENUM64}  # whose parts begin with a name
_WRAPPERS = {TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG}

_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F


@dataclass
class Type:
    """One type. `parts` are members, values or parameters: a name and the words after it."""

    name: str
    kind: int
    value: int = 0  # size in bytes, or the number of the type it wraps
    flag: bool = False  # of a struct: its offsets hold bit-field sizes; of a fwd: it is a union
    words: tuple[int, ...] = ()
    parts: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


VOID = Type("", 0)


def parse(raw: bytes) -> list[Type]:
    """All types by their numbers; 0 is void. ValueError for what is not BTF."""
    if len(raw) < _HEADER.size or struct.unpack_from("<H", raw)[0] != _MAGIC:
        raise ValueError("not little-endian BTF")
    _, _, _, head, type_at, type_length, text_at, text_length = _HEADER.unpack_from(raw)
    text = raw[head + text_at : head + text_at + text_length]
    at, end = head + type_at, head + type_at + type_length

    def name(offset: int) -> str:
        return text[offset : text.index(b"\0", offset)].decode()

    types = [VOID]
    while at < end:
        name_at, info, value = struct.unpack_from("<III", raw, at)
        at += 12
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        found = Type(name(name_at), kind, value, bool(info >> 31))
        if once := _ONCE.get(kind, 0):
            found.words = struct.unpack_from(f"<{once}I", raw, at)
        each = _EACH.get(kind, 0)
        for i in range(count if kind in _NAMED else 0):
            part = struct.unpack_from(f"<{each}I", raw, at + 4 * each * i)
            found.parts.append((name(part[0]), part[1:]))
        at += 4 * (once + each * count)
        types.append(found)
    return types


def serialise(types: list[Type]) -> bytes:
    """The reverse of `parse`."""
    text = bytearray(b"\0")
    known = {"": 0}

    def offset(name: str) -> int:
        if name not in known:
            known[name] = len(text)
            text.extend(name.encode() + b"\0")
        return known[name]

    body = bytearray()
    for found in types[1:]:
        info = found.flag << 31 | found.kind << 24 | len(found.parts)
        body += struct.pack("<III", offset(found.name), info, found.value)
        body += struct.pack(f"<{len(found.words)}I", *found.words)
        for name, words in found.parts:
            body += struct.pack(f"<{1 + len(words)}I", offset(name), *words)
    header = _HEADER.pack(_MAGIC, 1, 0, _HEADER.size, 0, len(body), len(body), len(text))
    return header + bytes(body) + bytes(text)


class Extract:
    """Copies types with what they need from one numbering into another."""

    def __init__(self, source: list[Type]) -> None:
        self.types = [VOID]
        self._source = source
        self._copied: dict[tuple[int, bool], int] = {}

    def add(self, number: int, *, pointed: bool = False) -> int:
        """The new number of a type; `pointed` if only a pointer leads to it."""
        key = (number, pointed and not self._is_whole(number))
        if number and key not in self._copied:
            self._copied[key] = len(self.types)
            self.types.append(VOID)  # until it is known: types may refer to themselves
            self.types[self._copied[key]] = self._copy(self._source[number], *key[1:])
        return self._copied.get(key, 0)

    def _is_whole(self, number: int) -> bool:
        """Whether a struct is copied with its members, by whatever road."""
        found = self._source[number]
        return found.kind in (STRUCT, UNION) and (not found.name or found.name in STRUCTS)

    def _copy(self, old: Type, pointed: bool) -> Type:
        new = Type(old.name, old.kind, old.value, old.flag, old.words)
        if old.kind == PTR:
            new.value = self.add(old.value, pointed=True)
        elif old.kind in _WRAPPERS or old.kind == FUNC:
            new.value = self.add(old.value, pointed=pointed)
        elif old.kind == ARRAY:
            element, index, count = old.words
            new.words = (self.add(element), self.add(index), count)
        elif old.kind == FUNC_PROTO:
            return self._prototype(old)
        elif old.kind in (STRUCT, UNION):
            if not old.name or old.name in STRUCTS:
                new.parts = [(n, (self.add(kind), at)) for n, (kind, at) in old.parts]
            elif pointed:
                return Type(old.name, FWD, 0, old.kind == UNION)
        elif old.kind in (ENUM, ENUM64) and old.name in ENUMS:
            new.parts = old.parts
        return new

    def _prototype(self, old: Type) -> Type:
        new = Type(old.name, FUNC_PROTO, self.add(old.value))
        new.parts = [(name, (self.add(kind),)) for name, (kind,) in old.parts]
        return new


def extract(raw: bytes) -> bytes:
    """The BTF of the types that blktrack reads."""
    types = parse(raw)
    result = Extract(types)
    for number, found in enumerate(types):
        if (
            (found.kind == STRUCT and found.name in STRUCTS)
            or (found.kind == ENUM and found.name in ENUMS)
            or (found.kind == TYPEDEF and found.name.startswith(TRACEPOINTS))
            or (found.kind == FUNC and found.name in FUNCTIONS)
        ):
            result.add(number)
    return serialise(result.types)


def section(elf: bytes, wanted: bytes) -> bytes:
    """A section of a little-endian 64-bit ELF file (elf(5)). ValueError if it has none."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)

    def entry(index: int) -> tuple[int, int, int]:
        at = table + size * index
        return struct.unpack_from("<I", elf, at)[0], *struct.unpack_from("<QQ", elf, at + 24)

    text = entry(names)[1]
    for index in range(count):
        name, at, length = entry(index)
        if elf[text + name :].startswith(wanted + b"\0"):
            return elf[at : at + length]
    raise ValueError(f"no section {wanted.decode()}")


def unpack(image: bytes) -> bytes:
    """The vmlinux in an x86 vmlinuz (Documentation/arch/x86/boot.rst)."""
    sectors = image[0x1F1] or 4
    at, length = struct.unpack_from("<II", image, 0x248)
    packed = image[(sectors + 1) * 512 + at :][:length]
    # Behind the compressed data stand four bytes, the unpacked length.
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(packed)
    if packed.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(packed)
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        command = ["zstd", "--decompress", "--stdout", "--quiet"]
        return subprocess.run(command, input=packed[:-4], capture_output=True, check=True).stdout
    raise ValueError("neither gzip, xz nor zstd")


def load(path: Path) -> bytes:
    """The raw BTF in a file."""
    data = path.read_bytes()
    if data[0x202:0x206] == b"HdrS":
        data = unpack(data)
    return section(data, b".BTF") if data.startswith(b"\x7fELF") else data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="vmlinuz, vmlinux or raw BTF")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    result = extract(load(arguments.source))
    arguments.output.write_bytes(result)
    print(f"{arguments.output}: {len(parse(result)) - 1} types, {len(result)} bytes")


if __name__ == "__main__":
    main()
