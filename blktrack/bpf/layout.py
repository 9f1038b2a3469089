"""Where the running kernel keeps what the programs read: BTF as C constants.

Nothing here asks for a kernel version; it asks whether a member, a value or an argument is there.
Kernels differ: `request.rq_disk` became `request_queue.disk` in 5.17 (f3fa33acca9f), operation
numbers move, and tracepoints lost their queue argument in 5.11 (a54895fa057c).
"""

from __future__ import annotations

import os

from blktrack.bpf.btf import Btf
from blktrack.bpf.libbpf import PROBES as PROBE_TYPE
from blktrack.errors import BlktrackError

# Operations that name the sectors they change. REQ_OP_WRITE_SAME ended with 5.18.
_CHANGES = ("WRITE", "DISCARD", "SECURE_ERASE", "WRITE_ZEROES", "WRITE_SAME")
_HARMLESS = ("READ", "FLUSH")

PROGRAMS = {
    "blk_rq_issue": "block_rq_issue",
    "blk_rq_issue_probe": "block_rq_issue",
    "blk_rq_issue_again": "block_rq_issue",
    "blk_rq_issue_last": "block_rq_issue",
    "blk_rq_complete": "block_rq_complete",
    "blk_bio_queue": "block_bio_queue",
    "blk_bio_queue_probe": "block_bio_queue",
    "blk_bio_queue_again": "block_bio_queue",
    "blk_bio_queue_last": "block_bio_queue",
    "blk_bio_complete": "block_bio_complete",
    "blk_bio_complete_again": "block_bio_complete",
}
# What is attached in place of a program where it can be preempted, and to which function: the one
# that calls all programs of a tracepoint, if there are several (include/linux/tracepoint.h).
PROBES = {
    "blk_rq_issue": ("blk_rq_issue_probe", "__traceiter_block_rq_issue"),
    "blk_bio_queue": ("blk_bio_queue_probe", "__traceiter_block_bio_queue"),
}
# The copies of a program there, in the order in which they run after it.
COPIES = {
    "blk_rq_issue": ("blk_rq_issue_again", "blk_rq_issue_last"),
    "blk_bio_queue": ("blk_bio_queue_again", "blk_bio_queue_last"),
    "blk_bio_complete": ("blk_bio_complete_again", "blk_bio_complete_again"),
}

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


MACHINE = os.uname().machine
# Where a function has its second argument when it is called: a member of pt_regs, and how far in.
_SECOND = {"x86_64": ("si", 0), "aarch64": ("regs", 8)}


class UnknownKernel(BlktrackError):
    """The kernel's types are not as the programs need them."""


def constants(btf: Btf) -> dict[str, int | str]:
    """Names and values for the C compiler. UnknownKernel names what is missing."""
    try:
        found: dict[str, int | str] = {
            name: btf.offset(struct, path) for name, (struct, path) in _FIELDS.items()
        }
        found |= _disks(btf) | _operations(btf) | _arguments(btf)
    except KeyError as error:
        raise UnknownKernel(
            f"this kernel's BTF has no {error.args[0]}, which tracking needs",
            hint="use a kernel from 5.14 on that has BTF (CONFIG_DEBUG_INFO_BTF)",
        ) from error
    return found | {"PREEMPTIBLE": int(preemptible(btf))} | _probes(btf)


def preemptible(btf: Btf) -> bool:
    """Whether COPIES have to be attached, so that what one program misses another sees.

    The kernel does not run a program that is running on that CPU already. For long that came about
    in its interrupts alone. Since SRCU guards tracepoints (a46023d5616e) a program can be preempted
    as well, and what other tasks do on that CPU meanwhile goes by it. To forbid it preemption is no
    help: what had to wait comes where it allows it again, and there it is still running.

    A probe cannot be preempted, so one comes first; but while a task is preempted in the middle of
    a system call on BPF maps, the kernel runs no probes on that CPU (bpf_disable_instrumentation).
    Then, or without it, each of the copies has to be preempted in a task of its own, on one CPU, at
    one time: of the changes of four tasks that only wrote to zram, three copies lost one of 400.

    They are copies in full. What a program goes over into by a tail call is not kept from running
    twice at once on a CPU, while its stack may be one that it has for itself there
    (bpf_enable_priv_stack).
    """
    return btf.has("tp_transition_snapshot", "srcu_gp")


def cast(btf: Btf) -> int:
    """BTF id of bpf_rdonly_cast, which tells a probe the type of what it gets (6.2, a35b9af4ec2c).

    0 where probes are of no use, or there are none.
    """
    if not preemptible(btf) or not PROBE_TYPE.exists() or MACHINE not in _SECOND:
        return 0
    try:
        return btf.function("bpf_rdonly_cast")
    except KeyError:
        return 0


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


def _probes(btf: Btf) -> dict[str, int | str]:
    if not cast(btf):
        return {"PROBED": 0}
    member, add = _SECOND[MACHINE]
    return {
        "PROBED": 1,
        "REGS_SECOND": btf.offset("pt_regs", member) + add,
        "TYPE_BIO": btf.struct("bio"),
        "TYPE_REQUEST": btf.struct("request"),
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
