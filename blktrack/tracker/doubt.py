"""What may have gone unseen: each way to lose a mark, found and put into words."""

from __future__ import annotations

import os

from blktrack import mapper
from blktrack.bpf.kernel import Kernel
from blktrack.bpf.programs import Program
from blktrack.state import DeviceState, Epoch
from blktrack.sysfs import BlockDevice, boot_id
from blktrack.tracker.account import Account
from blktrack.units import format_size

LOSSES = {
    "opaque": "{n} pass-through or unknown commands may have changed any part of it",
    "beyond": "{n} writes lay beyond the end it had when tracking began",
    "full": "{n} writes could not be remembered until their completion",
    "unbegun": "{n} writes ended that were not seen to begin",
    "overflow": "{n} discards had more ranges than can be followed",
}


def of_identity(state: DeviceState, device: BlockDevice) -> str | None:
    """Is it still the device, in the boot, that tracking began on? It may have grown."""
    release = os.uname().release
    other = f" into Linux {release} (was {state.release})" if state.release != release else ""
    if state.boot_id != boot_id():
        if state.in_use:
            return f"the host was rebooted{other} and had not stopped cleanly: {state.in_use}"
        return f"the host was rebooted{other} without blktrack stop"
    if other:
        return f"the kernel changed{other}"
    if state.diskseq != device.diskseq:
        return f"the device was re-created (sequence {device.diskseq}, was {state.diskseq})"
    if state.start != device.start:
        return f"the partition was moved from byte {state.start} to {device.start}"
    if device.size < state.size:
        return f"the device shrank from {format_size(state.size)} to {format_size(device.size)}"
    return None


def of_programs(state: DeviceState, programs: dict[str, Program]) -> str | None:
    """Are they the very programs that the generation began with?"""
    for name, program in programs.items():
        if state.programs.get(name) != list(program.links):
            return f"program {name} was detached and attached anew"
    return None


def of_window(state: DeviceState, kernel: Kernel, maps: set[int]) -> str | None:
    """Do slot and maps still belong to the device?"""
    window = kernel.windows.window(state.slot)
    if window is None or (window.start, window.length, window.granularity) != (
        state.start,
        state.size,
        state.granularity,
    ):
        return f"slot {state.slot} of the tracking maps was given to another device"
    if maps != set(state.maps):
        return "the dirty maps were replaced"
    return None


def of_table(before: list[str] | None, now: list[str]) -> str | None:
    """Does the device map to what it did? No write to it tells of data that come with a table."""
    if before is None or mapper.goes_on(before, now):
        return None
    return "device-mapper has another table for it, which may have brought other data"


def of_counters(stats: dict[str, int], *, growing: bool = False) -> str | None:
    """Losses that the programs counted; the counters began at zero with the generation.

    growing -- the device has grown, and all beyond its old end is going to be taken as changed.
    """
    found = [
        text.format(n=stats[name])
        for name, text in LOSSES.items()
        if stats[name] and not (growing and name == "beyond")
    ]
    return "; ".join(found) or None


def of_account(before: Account | None, now: Account | None, *, bio: bool) -> str | None:
    """Changes seen to begin are covered by the submitted planes; others are not.

    A count that is not kept, or is less than it was, left changes out. None is taken of a bio-based
    device, whose programs see all that the kernel could tell.
    """
    if bio:
        return None
    if before is None or now is None or (now.exact and now.unended < before.unended):
        return "the kernel did not count all its writes (queue/iostats was 0)"
    if now.unended > before.unended and now.unbegun > before.unbegun:
        count = now.unbegun - before.unbegun
        return f"{format_size(count)} of changes were seen by the kernel alone"
    return None


def of_misses(epoch: Epoch, submit: Program, complete: Program, *, bio: bool) -> str | None:
    """Program runs that the kernel skipped (`recursion_misses`, per program, since 6.1).

    Skipped completions alone are covered: by the submitted planes, on bio-based devices by the
    table of what is in flight. There a completion tells no range without its submission; on others
    the two must both be missing. Where a probe was off, nobody knows how many runs there were.
    """
    submits = submit.missed_since(epoch.submit_missed)
    completes = complete.missed_since(epoch.complete_missed)
    if submits < 0:
        return f"{-submits} changes were seen to begin while the probe for it was off"
    if bio and submits:
        return f"the kernel skipped {submits} runs of the program that sees writes begin"
    if not bio and completes and (submits or epoch.submit_unsure):
        return f"the kernel skipped {submits + completes} runs of both tracking programs"
    return None
