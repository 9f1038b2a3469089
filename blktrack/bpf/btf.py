"""Types of the running kernel, read from its BTF through libbpf.

Format: Documentation/bpf/btf.rst. Only what the programs need: members of structs by path, values
of enums, and the arguments of tracepoints.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blktrack.bpf.libbpf import library

VMLINUX = Path("/sys/kernel/btf/vmlinux")

# BTF_KIND_*
_PTR, _STRUCT, _UNION, _ENUM, _TYPEDEF, _FUNC, _PROTO = 2, 4, 5, 6, 8, 12, 13
_QUALIFIERS = {_TYPEDEF, 9, 10, 11, 18}  # VOLATILE, CONST, RESTRICT, TYPE_TAG


class _Type(ct.Structure):
    """struct btf_type"""

    _fields_ = (("name", ct.c_uint32), ("info", ct.c_uint32), ("type", ct.c_uint32))


class _Member(ct.Structure):
    """struct btf_member; struct btf_enum and btf_param are its first two words"""

    _fields_ = (("name", ct.c_uint32), ("type", ct.c_uint32), ("offset", ct.c_uint32))


class Parameter(NamedTuple):
    name: str
    pointee: str  # the struct it points to, "" if it points to none


class Btf:
    """KeyError for a type or member that is not there; OSError for BTF that cannot be read."""

    def __init__(self, path: Path = VMLINUX) -> None:
        lib = library()
        lib.btf__parse.restype = ct.c_void_p
        lib.btf__type_by_id.restype = ct.POINTER(_Type)
        lib.btf__name_by_offset.restype = ct.c_char_p
        handle = lib.btf__parse(str(path).encode(), None)
        if not handle:
            raise OSError(ct.get_errno(), f"cannot read BTF from {path}")
        self._lib = lib
        self._handle = ct.c_void_p(handle)

    def close(self) -> None:
        """Free it; using it afterwards is an error."""
        self._lib.btf__free(self._handle)
        self._handle = ct.c_void_p()  # freeing NULL does nothing

    def find(self, name: str, kind: int) -> int:
        number = int(self._lib.btf__find_by_name_kind(self._handle, name.encode(), kind))
        if number <= 0:
            raise KeyError(name)
        return number

    def tracepoint(self, name: str) -> int:
        """BTF id to attach a typed raw tracepoint program to."""
        return self.find(f"btf_trace_{name}", _TYPEDEF)

    def struct(self, name: str) -> int:
        """BTF id of a struct."""
        return self.find(name, _STRUCT)

    def function(self, name: str) -> int:
        """BTF id by which a program may call a function of the kernel."""
        return self.find(name, _FUNC)

    def has(self, struct: str, path: str) -> bool:
        try:
            self.offset(struct, path)
        except KeyError:
            return False
        return True

    def offset(self, struct: str, path: str) -> int:
        """Byte offset of a member, `path` as in C: `bi_iter.bi_sector`."""
        number = self.find(struct, _STRUCT)
        total = 0
        for name in path.split("."):
            found = self._member(number, name)
            if found is None:
                raise KeyError(f"{struct}.{path}")
            bits, number = found
            if bits % 8:
                raise KeyError(f"byte offset of {struct}.{path}, a bit field")
            total += bits // 8
        return total

    def enum(self, *names: str) -> dict[str, int]:
        """Values by name of the first of these enums that the kernel has."""
        for name in names:
            try:
                number = self.find(name, _ENUM)
            except KeyError:
                continue
            return {self._name(e.name): ct.c_int32(e.type).value for e in self._parts(number, 2)}
        raise KeyError(names[0])

    def parameters(self, tracepoint: str) -> list[Parameter]:
        """What a tracepoint hands to its programs, in the order of their context's words."""
        number = self._type(self.tracepoint(tracepoint)).type
        while self._kind(number) == _PTR:
            number = self._type(number).type
        if self._kind(number) != _PROTO:
            raise KeyError(tracepoint)
        every = [
            Parameter(self._name(p.name), self._pointee(p.type)) for p in self._parts(number, 2)
        ]
        return every[1:]  # the first is the tracepoint's own private pointer

    def _type(self, number: int) -> _Type:
        pointer = self._lib.btf__type_by_id(self._handle, ct.c_uint32(number))
        if not pointer:
            raise KeyError(number)
        found: _Type = pointer.contents
        return found

    def _kind(self, number: int) -> int:
        return int(self._type(number).info >> 24 & 0x1F) if number else 0

    def _name(self, offset: int) -> str:
        text: bytes = self._lib.btf__name_by_offset(self._handle, ct.c_uint32(offset)) or b""
        return text.decode()

    def _parts(self, number: int, words: int) -> Iterator[_Member]:
        """Members, values or parameters, of `words` words each, that follow a type."""
        head = self._type(number)
        start = ct.addressof(head) + ct.sizeof(_Type)
        for i in range(head.info & 0xFFFF):
            raw = (ct.c_uint32 * words).from_address(start + 4 * words * i)
            yield _Member(raw[0], raw[1], raw[2] if words == 3 else 0)

    def _resolve(self, number: int) -> int:
        while self._kind(number) in _QUALIFIERS:
            number = self._type(number).type
        return number

    def _pointee(self, number: int) -> str:
        number = self._resolve(number)
        if self._kind(number) != _PTR:
            return ""
        number = self._resolve(self._type(number).type)
        return self._name(self._type(number).name) if number else ""

    def _member(self, number: int, name: str) -> tuple[int, int] | None:
        """Offset in bits and type of a member, looked for in unnamed structs and unions too."""
        number = self._resolve(number)
        if self._kind(number) not in (_STRUCT, _UNION):
            return None
        flag = self._type(number).info >> 31  # member offsets then hold bit-field sizes as well
        for member in self._parts(number, 3):
            bits = member.offset & 0xFFFFFF if flag else member.offset
            own = self._name(member.name)
            if own == name and flag and member.offset >> 24:
                raise KeyError(f"byte offset of {name}, a bit field")
            if own == name:
                return bits, member.type
            if not own and (inner := self._member(member.type, name)):
                return bits + inner[0], inner[1]
        return None
