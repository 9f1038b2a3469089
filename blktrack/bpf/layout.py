"""Where the running kernel keeps what the programs read: BTF as C constants.

Nothing here asks for a kernel version; it asks whether a member, a value or an argument is there.
Kernels differ: `request.rq_disk` became `request_queue.disk` in 5.17 (f3fa33acca9f), operation
numbers move, and tracepoints lost their queue argument in 5.11 (a54895fa057c).
"""

from __future__ import annotations

from blktrack.bpf.btf import Btf
from blktrack.errors import BlktrackError

# Operations that name the sectors they change. REQ_OP_WRITE_SAME ended with 5.18.
_CHANGES = ("WRITE", "DISCARD", "SECURE_ERASE", "WRITE_ZEROES", "WRITE_SAME")
_HARMLESS = ("READ", "FLUSH")

PROGRAMS = {
    "blk_rq_issue": "block_rq_issue",
    "blk_rq_complete": "block_rq_complete",
    "blk_bio_queue": "block_bio_queue",
    "blk_bio_complete": "block_bio_complete",
    "blk_bio_complete_again": "block_bio_complete",
}
# What copies of a program do, if not the same.
AGAIN = {"blk_bio_complete": "blk_bio_complete_again"}

_FIELDS = {
    "GENDISK_MAJOR": ("gendisk", "major"),
    "GENDISK_FIRST_MINOR": ("gendisk", "first_minor"),
    "RQ_CMD_FLAGS": ("request", "cmd_flags"),
    "RQ_SECTOR": ("request", "__sector"),
    "RQ_DATA_LEN": ("request", "__data_len"),
    "RQ_BIO": ("request", "bio"),
    "RQ_BIOTAIL": ("request", "biotail"),
    "BIO_NEXT": ("bio", "bi_next"),
    "BIO_OPF": ("bio", "bi_opf"),
    "BIO_PRIVATE": ("bio", "bi_private"),
    "BIO_SECTOR": ("bio", "bi_iter.bi_sector"),
    "BIO_SIZE": ("bio", "bi_iter.bi_size"),
}


class UnknownKernel(BlktrackError):
    """The kernel's types are not as the programs need them."""


def constants(btf: Btf) -> dict[str, int | str]:
    """Names and values for the C compiler. UnknownKernel names what is missing."""
    try:
        found: dict[str, int | str] = {
            name: btf.offset(struct, path) for name, (struct, path) in _FIELDS.items()
        }
        found |= _disks(btf) | _operations(btf) | _arguments(btf) | {"COPIES": copies(btf)}
    except KeyError as error:
        raise UnknownKernel(
            f"this kernel's BTF has no {error.args[0]}, which tracking needs",
            hint="use a kernel from 5.14 on that has BTF (CONFIG_DEBUG_INFO_BTF)",
        ) from error
    return found


def copies(btf: Btf) -> int:
    """How many of each bio program have to be attached, so that what one misses another sees.

    The kernel does not run a program that is running on that CPU already. For long that came about
    in its interrupts alone. Since SRCU guards tracepoints (a46023d5616e) a program can be preempted
    as well, and what other tasks do on that CPU meanwhile goes by it. Of three, each would have to
    be preempted in a task of its own, on one CPU, at one time.
    """
    return 3 if btf.has("tp_transition_snapshot", "srcu_gp") else 1


def has_rw_page(btf: Btf) -> bool:
    """Up to 6.2 zram, brd and pmem could do swap pages without a bio (3222d8c2a7f8 ended it)."""
    return btf.has("block_device_operations", "rw_page")


def _disks(btf: Btf) -> dict[str, int | str]:
    """Expressions for the gendisk of a request and of a bio."""
    if btf.has("request_queue", "disk"):
        queue, disk = btf.offset("request", "q"), btf.offset("request_queue", "disk")
        request = f"FIELD(void *, FIELD(void *, rq, {queue}), {disk})"
    else:
        request = f"FIELD(void *, rq, {btf.offset('request', 'rq_disk')})"
    device, disk = btf.offset("bio", "bi_bdev"), btf.offset("block_device", "bd_disk")
    return {
        "RQ_DISK(rq)": request,
        "BIO_DISK(bio)": f"FIELD(void *, FIELD(void *, bio, {device}), {disk})",
    }


def _operations(btf: Btf) -> dict[str, int | str]:
    values = btf.enum("req_op", "req_opf")  # renamed in 6.0 (ff07a02e9e8e)
    flags = btf.enum("req_flag_bits")
    bits = flags["__REQ_FAILFAST_DEV"]  # the first flag above the operation

    def mask(names: tuple[str, ...]) -> str:
        present = [values[f"REQ_OP_{name}"] for name in names if f"REQ_OP_{name}" in values]
        return f"{sum(1 << value for value in present):#x}ULL"

    return {
        "REQ_OP_MASK": (1 << bits) - 1,
        "REQ_PREFLUSH": 1 << flags["__REQ_PREFLUSH"],
        "REQ_OP_DISCARD": values["REQ_OP_DISCARD"],
        "REQ_OP_DRV_IN": values["REQ_OP_DRV_IN"],
        "CHANGE_OPS": mask(_CHANGES),
        "HARMLESS_OPS": mask(_HARMLESS),
    }


def _arguments(btf: Btf) -> dict[str, int | str]:
    def index(tracepoint: str, struct: str) -> int:
        for number, parameter in enumerate(btf.parameters(tracepoint)):
            if parameter.pointee == struct:
                return number
        raise KeyError(f"argument struct {struct} of {tracepoint}")

    return {
        "RQ_ISSUE_ARG": index("block_rq_issue", "request"),
        "RQ_COMPLETE_ARG": index("block_rq_complete", "request"),
        "RQ_COMPLETE_BYTES_ARG": len(btf.parameters("block_rq_complete")) - 1,
        "BIO_QUEUE_ARG": index("block_bio_queue", "bio"),
        "BIO_COMPLETE_ARG": index("block_bio_complete", "bio"),
    }
