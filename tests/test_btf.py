"""Reading a kernel's layout: stored types of real kernels, and made-up ones for what they lack.

The files in data/btf were cut by tools/btf_extract.py from Debian's linux-image-6.1.0-56-amd64,
linux-image-6.12.117+deb13-amd64 and linux-image-7.2.13+deb14-amd64, and from a plain 6.18 built
without most of the options that Debian sets. Numbers expected here were read off with bpftool.
"""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blktrack.bpf import layout
from blktrack.bpf.btf import VMLINUX, Btf, Parameter
from blktrack.bpf.layout import UnknownKernel
from tools import btf_extract
from tools.btf_extract import (
    ARRAY,
    CONST,
    ENUM,
    FUNC_PROTO,
    FWD,
    INT,
    PTR,
    RESTRICT,
    STRUCT,
    TYPE_TAG,
    TYPEDEF,
    UNION,
    VOID,
    VOLATILE,
    Type,
)

DATA = Path(__file__).parent / "data/btf"

# The same on all of them.
COMMON: dict[str, int | str] = {
    "GENDISK_MAJOR": 0,
    "GENDISK_FIRST_MINOR": 4,
    "RQ_CMD_FLAGS": 24,
    "RQ_SECTOR": 48,
    "RQ_DATA_LEN": 44,
    "RQ_BIO": 56,
    "RQ_BIOTAIL": 64,
    "BIO_NEXT": 0,
    "BIO_OPF": 16,
    "REQ_OP_MASK": 255,
    "REQ_OP_DISCARD": 3,
    "REQ_OP_DRV_IN": 34,
    # WRITE 1, DISCARD 3, SECURE_ERASE 5, WRITE_ZEROES 9; not ZONE_APPEND 7, once WRITE_SAME's
    "CHANGE_OPS": "0x22aULL",
    "HARMLESS_OPS": "0x5ULL",  # READ 0, FLUSH 2
    "REQ_PREFLUSH": 1 << 18,
    "RQ_ISSUE_ARG": 0,
    "RQ_COMPLETE_ARG": 0,
    "RQ_COMPLETE_BYTES_ARG": 2,
    "BIO_QUEUE_ARG": 0,
    "BIO_COMPLETE_ARG": 1,
}


def kernel(iterator: int, queue_disk: int, device_disk: int) -> dict[str, int | str]:
    """Constants of a kernel, by the offsets of bio.bi_iter, request_queue.disk and bd_disk."""
    return COMMON | {
        "BIO_SECTOR": iterator,
        "BIO_SIZE": iterator + 8,
        "BIO_PRIVATE": iterator + 32,
        "RQ_DISK(rq)": f"FIELD(void *, FIELD(void *, rq, 0), {queue_disk})",
        "BIO_DISK(bio)": f"FIELD(void *, FIELD(void *, bio, 8), {device_disk})",
    }


KERNELS = {
    "6.1": kernel(32, 160, 856) | {"PREEMPTIBLE": 0},
    "6.12": kernel(32, 104, 16) | {"PREEMPTIBLE": 0},
    "6.18": kernel(32, 104, 16) | {"PREEMPTIBLE": 0},
    "7.2": kernel(40, 96, 16) | {"PREEMPTIBLE": 1},
}


@contextmanager
def opened(path: Path) -> Iterator[Btf]:
    btf = Btf(path)
    try:
        yield btf
    finally:
        btf.close()


@pytest.fixture(params=KERNELS)
def stored(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_stored_kernel_is_expected() -> None:
    assert {path.stem for path in DATA.glob("*.btf")} == set(KERNELS)


@pytest.mark.parametrize("probes", [True, False])
def test_constants(
    stored: str, probes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the running kernel has probes is no matter of types."""
    place = tmp_path / "type"
    if probes:
        place.write_text("8\n")
    monkeypatch.setattr(layout, "PROBE_TYPE", place)
    monkeypatch.setattr(layout, "MACHINE", "x86_64")
    with opened(DATA / f"{stored}.btf") as btf:
        found = layout.constants(btf)
        wanted = KERNELS[stored] | {"PROBED": 0}
        if probes and stored == "7.2":
            wanted |= {"PROBED": 1, "REGS_SECOND": 104}
            wanted |= {"TYPE_BIO": btf.struct("bio"), "TYPE_REQUEST": btf.struct("request")}
            assert layout.cast(btf) == btf.function("bpf_rdonly_cast") > 0
        assert found == wanted


def test_only_old_kernels_write_pages_without_a_bio(stored: str) -> None:
    with opened(DATA / f"{stored}.btf") as btf:
        assert layout.has_rw_page(btf) == (stored == "6.1")
        assert btf.has("block_device_operations", "submit_bio")


def test_tracepoints(stored: str) -> None:
    """As they are declared in include/trace/events/block.h; a prototype holds no names."""
    with opened(DATA / f"{stored}.btf") as btf:
        arguments = {
            name: [parameter.pointee for parameter in btf.parameters(name)]
            for name in layout.PROGRAMS.values()
        }
        assert arguments == {
            "block_rq_issue": ["request"],
            "block_rq_complete": ["request", "", ""],
            "block_bio_queue": ["bio"],
            "block_bio_complete": ["request_queue", "bio"],
        }
        numbers = {btf.tracepoint(name) for name in layout.PROGRAMS.values()}
        assert len(numbers) == len(arguments)


def test_what_is_not_there(stored: str) -> None:
    with opened(DATA / f"{stored}.btf") as btf:
        for struct_, path in [
            ("no_such_struct", "x"),
            ("bio", "no_such_member"),
            ("bio", "bi_iter.no_such_member"),
            ("bio", "bi_next.bi_next"),  # a pointer is not walked through
            ("bio", "bi_opf.x"),
        ]:
            assert not btf.has(struct_, path)
            with pytest.raises(KeyError):
                btf.offset(struct_, path)
        with pytest.raises(KeyError):
            btf.tracepoint("block_no_such_event")
        with pytest.raises(KeyError):
            btf.enum("no_such_enum", "nor_this_one")


@pytest.mark.needs("bpf")
def test_the_running_kernel() -> None:
    with opened(VMLINUX) as btf:
        assert layout.constants(btf)


@pytest.mark.needs("bpf")
def test_a_cut_of_the_running_kernel_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "cut.btf"
    path.write_bytes(btf_extract.extract(btf_extract.load(VMLINUX)))
    with opened(VMLINUX) as whole, opened(path) as cut:
        assert layout.constants(cut) == layout.constants(whole)
        assert layout.has_rw_page(cut) == layout.has_rw_page(whole)


@pytest.mark.parametrize("content", [b"", b"no types", b"\x9f\xeb\1\0" + b"\xff" * 20])
def test_what_is_no_btf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(OSError, match="cannot read BTF"):
        Btf(tmp_path / "x")
    with pytest.raises(OSError, match="cannot read BTF"):
        Btf(tmp_path / "none")


class Kernel:
    """Types of a kernel that never was, by what a test wants of them."""

    def __init__(self) -> None:
        self.types = [VOID]
        self.u32 = self.add(Type("unsigned int", INT, 4, words=(32,)))
        self.u64 = self.add(Type("unsigned long", INT, 8, words=(64,)))
        self.gendisk = self.struct("gendisk", major=(self.u32, 0), first_minor=(self.u32, 4))
        self.queue = self.struct("request_queue", disk=(self.pointer(self.gendisk), 80))
        self.bio = self.bio_()
        self.request = self.request_(q=(self.pointer(self.queue), 0))
        self.device = self.struct("block_device", bd_disk=(self.pointer(self.gendisk), 24))
        self.enum("req_op", READ=0, WRITE=1, FLUSH=2, DISCARD=3, DRV_IN=32)
        self.enum("req_flag_bits", __REQ_FAILFAST_DEV=6, __REQ_PREFLUSH=16)
        request, queue, bio = map(self.pointer, (self.request, self.queue, self.bio))
        self.tracepoint("block_rq_issue", request)
        self.tracepoint("block_rq_complete", request, self.u32, self.u32)
        self.tracepoint("block_bio_queue", bio)
        self.tracepoint("block_bio_complete", queue, bio)

    def add(self, found: Type) -> int:
        """A type, in the place of one of that name and kind if there is one."""
        for number, old in enumerate(self.types):
            if found.name and (old.name, old.kind) == (found.name, found.kind):
                self.types[number] = found
                return number
        self.types.append(found)
        return len(self.types) - 1

    def drop(self, name: str) -> None:
        for found in self.types:
            if found.name == name:
                found.name = f"not_{name}"

    def pointer(self, number: int) -> int:
        return self.add(Type("", PTR, number))

    def wrapped(self, number: int, kind: int) -> int:
        name = {TYPEDEF: f"type_{number}", TYPE_TAG: "rcu"}.get(kind, "")
        self.types.append(Type(name, kind, number))
        return len(self.types) - 1

    def struct(self, name: str, **members: tuple[int, int]) -> int:
        """Members by name: type and offset in bytes."""
        parts = [(member, (kind, 8 * offset)) for member, (kind, offset) in members.items()]
        return self.add(Type(name, STRUCT, 256, parts=list(parts)))

    def enum(self, name: str, **values: int) -> int:
        prefix = "REQ_OP_" if name.startswith("req_op") else ""
        return self.add(
            Type(name, ENUM, 4, parts=[(f"{prefix}{n}", (v,)) for n, v in values.items()])
        )

    def tracepoint(self, name: str, *arguments: int) -> None:
        parts = [("", (number,)) for number in (self.pointer(0), *arguments)]
        prototype = self.add(Type("", FUNC_PROTO, parts=list(parts)))
        self.add(Type(f"btf_trace_{name}", TYPEDEF, self.pointer(prototype)))

    def bio_(self, **more: tuple[int, int]) -> int:
        iterator = self.struct("bvec_iter", bi_sector=(self.u64, 0), bi_size=(self.u32, 8))
        pointer = self.pointer(0)
        members = {"bi_next": (pointer, 0), "bi_bdev": (pointer, 8), "bi_opf": (self.u32, 16)}
        members |= {"bi_iter": (iterator, 32), "bi_private": (pointer, 64)}
        return self.struct("bio", **members | more)

    def request_(self, **more: tuple[int, int]) -> int:
        pointer = self.pointer(0)
        members = {"cmd_flags": (self.u32, 16), "__data_len": (self.u32, 24)}
        members |= {"__sector": (self.u64, 32), "bio": (pointer, 40), "biotail": (pointer, 48)}
        return self.struct("request", **members | more)

    @contextmanager
    def open(self, folder: Path) -> Iterator[Btf]:
        path = folder / "made-up.btf"
        path.write_bytes(btf_extract.serialise(self.types))
        with opened(path) as btf:
            yield btf


@pytest.fixture
def made() -> Kernel:
    return Kernel()


def test_made_up_kernel(made: Kernel, tmp_path: Path) -> None:
    with made.open(tmp_path) as btf:
        found = layout.constants(btf)
    assert found["RQ_DISK(rq)"] == "FIELD(void *, FIELD(void *, rq, 0), 80)"
    assert found["BIO_DISK(bio)"] == "FIELD(void *, FIELD(void *, bio, 8), 24)"
    assert (found["BIO_SECTOR"], found["BIO_SIZE"]) == (32, 40)
    assert found["REQ_OP_MASK"] == 63
    assert found["REQ_OP_DRV_IN"] == 32
    assert found["CHANGE_OPS"] == "0xaULL"


def test_a_request_that_names_its_disk(made: Kernel, tmp_path: Path) -> None:
    """Before 5.15 a queue did not know its disk, a request did until 5.17."""
    pointer = made.pointer(made.gendisk)
    made.struct("request_queue", elevator=(pointer, 0))
    made.request_(q=(made.pointer(made.queue), 0), rq_disk=(pointer, 96))
    with made.open(tmp_path) as btf:
        assert layout.constants(btf)["RQ_DISK(rq)"] == "FIELD(void *, rq, 96)"


def test_tracepoints_with_a_queue_in_front(made: Kernel, tmp_path: Path) -> None:
    """Before 5.11 (a54895fa057c)."""
    request, queue, bio = map(made.pointer, (made.request, made.queue, made.bio))
    made.tracepoint("block_rq_issue", queue, request)
    made.tracepoint("block_bio_queue", queue, bio)
    with made.open(tmp_path) as btf:
        found = layout.constants(btf)
        assert btf.parameters("block_bio_queue") == [
            Parameter("", "request_queue"),
            Parameter("", "bio"),
        ]
    assert (found["RQ_ISSUE_ARG"], found["RQ_COMPLETE_ARG"]) == (1, 0)
    assert (found["BIO_QUEUE_ARG"], found["BIO_COMPLETE_ARG"]) == (1, 1)
    assert found["RQ_COMPLETE_BYTES_ARG"] == 2


def test_operations_of_before_6_0(made: Kernel, tmp_path: Path) -> None:
    """The enum's old name, other numbers, and WRITE_SAME, which ended with 5.18."""
    made.drop("req_op")
    made.enum(
        "req_opf",
        READ=0,
        WRITE=1,
        FLUSH=2,
        DISCARD=3,
        SECURE_ERASE=5,
        WRITE_SAME=7,
        WRITE_ZEROES=9,
        ZONE_APPEND=13,
        DRV_IN=34,
    )
    with made.open(tmp_path) as btf:
        found = layout.constants(btf)
    assert found["CHANGE_OPS"] == f"{1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 9:#x}ULL"
    assert found["REQ_OP_DRV_IN"] == 34


def test_members_in_unnamed_structs_and_bit_fields(made: Kernel, tmp_path: Path) -> None:
    inner = made.add(Type("", STRUCT, 16, parts=[("deep", (made.u32, 32))]))
    union = made.add(Type("", UNION, 16, parts=[("flat", (made.u64, 0)), ("", (inner, 64))]))
    named = made.struct("named", inside=(made.u32, 4))
    made.add(
        Type(
            "odd",
            STRUCT,
            64,
            flag=True,  # then the upper byte of an offset is the size of a bit field
            parts=[
                ("first", (made.u32, 0)),
                ("", (union, 64)),
                ("bit", (made.u32, 1 << 24 | 259)),
                ("whole_bit_field", (made.u32, 3 << 24 | 264)),
                ("wrapped", (made.wrapped(made.wrapped(named, CONST), TYPEDEF), 320)),
            ],
        )
    )
    with made.open(tmp_path) as btf:
        assert btf.offset("odd", "flat") == 8
        assert btf.offset("odd", "deep") == 8 + 8 + 4
        assert btf.offset("odd", "wrapped.inside") == 40 + 4
        assert not btf.has("odd", "inside")  # of a named struct it takes the name to get in
        for name in ("bit", "whole_bit_field"):
            with pytest.raises(KeyError, match="bit field"):
                btf.offset("odd", name)


@pytest.mark.parametrize("kind", [TYPEDEF, CONST, VOLATILE, RESTRICT, TYPE_TAG])
def test_arguments_behind_qualifiers(kind: int, made: Kernel, tmp_path: Path) -> None:
    """Of the struct and of the pointer itself."""
    inner = made.pointer(made.wrapped(made.request, kind))
    made.tracepoint("block_rq_issue", inner)
    if kind != TYPE_TAG:
        outer = made.wrapped(made.pointer(made.request), kind)
        made.tracepoint("block_rq_complete", outer, made.u32, made.u32)
    with made.open(tmp_path) as btf:
        for name in ("block_rq_issue", "block_rq_complete"):
            assert btf.parameters(name)[0].pointee == "request"


def without(name: str) -> Callable[[Kernel], object]:
    return lambda made: made.drop(name)


@pytest.mark.parametrize(
    ("spoil", "missing"),
    [
        (without("request"), "request"),
        (without("gendisk"), "gendisk"),
        (without("req_op"), "req_op"),
        (without("block_device"), "block_device"),
        (without("btf_trace_block_bio_queue"), "btf_trace_block_bio_queue"),
        (lambda made: made.struct("gendisk", major=(made.u32, 0)), "gendisk.first_minor"),
        (lambda made: made.bio_(bi_iter=(made.u32, 32)), "bio.bi_iter.bi_sector"),
        (lambda made: made.struct("request_queue"), "request.rq_disk"),
        (lambda made: made.enum("req_flag_bits", __REQ_SYNC=1), "__REQ_FAILFAST_DEV"),
        (lambda made: made.enum("req_op", WRITE=1), "REQ_OP_DISCARD"),
        (
            lambda made: made.tracepoint("block_rq_issue", made.pointer(made.queue)),
            "argument struct request of block_rq_issue",
        ),
    ],
)
def test_unknown_kernel_names_what_is_missing(
    spoil: Callable[[Kernel], object], missing: str, made: Kernel, tmp_path: Path
) -> None:
    spoil(made)
    with made.open(tmp_path) as btf, pytest.raises(UnknownKernel) as caught:
        layout.constants(btf)
    assert f"has no {missing}," in str(caught.value)
    assert caught.value.hint


def test_cutting_a_cut_changes_nothing(stored: str) -> None:
    raw = (DATA / f"{stored}.btf").read_bytes()
    assert len(raw) < 20 * 1024
    assert btf_extract.extract(raw) == raw
    assert btf_extract.serialise(btf_extract.parse(raw)) == raw


def test_a_cut_keeps_members_and_forgets_what_they_lead_to(made: Kernel) -> None:
    other = made.struct("other", x=(made.u32, 0))
    made.bio_(
        bi_private=(made.pointer(other), 64),
        bi_inline=(other, 72),
        bi_self=(made.pointer(made.bio), 96),
        bi_vecs=(made.add(Type("", ARRAY, words=(other, made.u32, 4))), 104),
    )
    made.struct("unrelated", y=(made.u32, 0))
    raw = btf_extract.extract(btf_extract.serialise(made.types))
    types = btf_extract.parse(raw)
    named = {(found.name, found.kind): found for found in types}
    assert ("unrelated", STRUCT) not in named
    assert ("other", FWD) in named  # by pointer
    assert named["other", STRUCT].value == 256  # by value: its size, not its members
    assert named["other", STRUCT].parts == []
    members = dict(named["bio", STRUCT].parts)
    assert {"bi_next", "bi_opf", "bi_private", "bi_inline", "bi_self"} <= set(members)
    assert types[types[members["bi_self"][0]].value] is named["bio", STRUCT]
    assert btf_extract.extract(raw) == raw


def bzimage(packed: bytes) -> bytes:
    """As much of a vmlinuz as there is to know of one: two sectors of set-up, then the payload."""
    head = bytearray(2 * 512)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 16, len(packed) + 4)
    return bytes(head) + b"x" * 16 + packed + b"size" + b"rest"


def elf(content: bytes) -> bytes:
    """An ELF file of three sections, the second .BTF."""
    names = b"\0.BTF\0.shstrtab\0"
    head = bytearray(64)
    head[:4] = b"\x7fELF"
    body = names + content
    struct.pack_into("<Q", head, 40, 64 + len(body))
    struct.pack_into("<HHH", head, 58, 64, 3, 2)
    table = bytes(64)
    for name, at, length in [(1, 64 + len(names), len(content)), (6, 64, len(names))]:
        table += struct.pack("<IIQQQQ", name, 1, 0, 0, at, length).ljust(64, b"\0")
    return bytes(head) + body + table


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_the_types_in_a_kernel_image(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    raw = (DATA / "6.12.btf").read_bytes()
    for content in (raw, elf(raw), bzimage(pack(elf(raw)))):
        (tmp_path / "kernel").write_bytes(content)
        assert btf_extract.load(tmp_path / "kernel") == raw


def test_what_is_no_kernel_image() -> None:
    with pytest.raises(ValueError, match="neither gzip, xz nor zstd"):
        btf_extract.unpack(bzimage(b"????"))
    with pytest.raises(ValueError, match="no section"):
        btf_extract.section(elf(b""), b".none")
    with pytest.raises(ValueError, match="not little-endian BTF"):
        btf_extract.parse(b"\xeb\x9f")
