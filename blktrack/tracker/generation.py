"""Beginning and ending the gap-free tracking history of a device.

A generation begins when programs and empty maps are in place and its record is written; it ends
with the first doubt, which is written with its reason before anything else is done about it. Died
between the slot and the record: the slot belongs to nobody and the next beginning takes it away.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from functools import partial

from blktrack import bitmap, crash, durable, mapper
from blktrack.bitfile import BitFile
from blktrack.bpf import abi, layout
from blktrack.bpf.btf import Btf
from blktrack.bpf.install import install
from blktrack.bpf.kernel import Detached, Kernel
from blktrack.bpf.planes import Geometry
from blktrack.bpf.programs import BY_KIND, Program
from blktrack.bpf.windows import Window
from blktrack.device import bypasses_bios, device_id
from blktrack.errors import BlktrackError, Refused, UsageError
from blktrack.observer import NOBODY, Observer
from blktrack.state import DeviceState, Doubt, Epoch, Store
from blktrack.sysfs import BlockDevice, boot_id, memory_available
from blktrack.tracker import account
from blktrack.units import GRANULARITY_MOST, KIB, MIB, format_size

MAP_BUDGET = 32 * MIB  # kernel memory for the dirty maps of one device, by default
_DRAIN_SECONDS, _QUIET_SECONDS = 30.0, 0.2
_LOOKS = 50


def window_of(device: BlockDevice, size: int, granularity: int) -> Window:
    """What a slot for the first `size` bytes of a device tracks."""
    kind = abi.KIND_REQUEST if device.request_based else abi.KIND_BIO
    disk = abi.disk_number(*device.disk.number)
    whole = not device.is_partition
    return Window(disk, kind, device.start, size, granularity, whole)


def default_granularity(size: int, block_size: int) -> int:
    """4 KiB, or the least at which both maps of a device fit the budget."""
    granularity = max(4 * KIB, block_size)
    while 2 * Geometry(bitmap.granules_for(size, granularity)).map_bytes > MAP_BUDGET:
        granularity *= 2
    return granularity


def check_granularity(granularity: int, device: BlockDevice) -> None:
    if granularity & (granularity - 1) or granularity < device.block_size:
        raise UsageError(
            f"granularity {format_size(granularity)} does not suit {device.path}",
            hint=f"use a power of two of at least {device.block_size} bytes",
        )
    if granularity > GRANULARITY_MOST:
        raise UsageError(
            f"granularity {format_size(granularity)} is more than 64 MiB", hint="use a smaller one"
        )


def check_memory(
    device: BlockDevice, geometry: Geometry, *, hint: str = "choose a larger --granularity"
) -> None:
    """Refused where the dirty maps would take a large part of the memory that is left."""
    needed, available = 2 * geometry.map_bytes, memory_available()
    if needed > available // 2:
        raise Refused(
            f"tracking {device.path} needs {format_size(needed)} of kernel memory for its dirty "
            f"maps, and {format_size(available)} are available",
            hint=hint,
        )


def begin(
    store: Store, device: BlockDevice, granularity: int | None, observer: Observer = NOBODY
) -> DeviceState:
    """Start tracking anew, whatever was before. The caller holds the device's lock."""
    number = device_id(device)
    state = store.device(number) or DeviceState(number, device.path, device.permanent_name)
    if granularity:
        check_granularity(granularity, device)
    else:
        granularity = default_granularity(device.size, device.block_size)
    window = window_of(device, device.size, granularity)
    epoch = Epoch(str(uuid.uuid4()))
    occupy(store, state, device, window, epoch, observer=observer)
    state.path, state.name, state.wanted = device.path, device.permanent_name, True
    state.boot_id, state.release, state.diskseq = boot_id(), os.uname().release, device.diskseq
    state.size, state.start, state.granularity = device.size, device.start, granularity
    state.generation, state.began, state.in_use = epoch.generation, time.time(), ""
    # What links had to ship belongs to the generation before, and may be of another size.
    for name in ("pending", "shipping", "held", "racing"):
        for path in store.link_files(number, name):
            path.unlink(missing_ok=True)
    words = window.geometry.levels[0]
    BitFile(store.run(number) / "settling", words, create=True).close()
    store.save_epoch(number, epoch)
    crash.point("begin-epoch")
    store.save_device(state)
    crash.point("begin-recorded")
    return state


def occupy(
    store: Store,
    state: DeviceState,
    device: BlockDevice,
    window: Window,
    epoch: Epoch,
    *,
    observer: Observer = NOBODY,
) -> None:
    """Attach programs and give the device a slot with empty maps, noted in `state` and `epoch`."""
    check_memory(device, window.geometry)
    if device.request_based and not account.available(device):
        raise Refused(
            f"the kernel does not count what is written to {device.path} (queue/iostats is 0), by "
            "which changes that no program sees are found",
            hint=f"run echo 1 >/sys/block/{device.disk.sys.name}/queue/iostats",
        )
    epoch.table = mapper.table(device)  # before anything of it is read
    if bypasses_bios(device):
        _refuse_rw_page(device)
    observer.phase(f"attaching the tracking programs to {device.path}", 0)
    with durable.lock(store.kernel_lock, what="the tracking programs", wait=30, observer=observer):
        with install(store.paths.pins, window.kind) as kernel:
            for slot in kernel.windows.slots(window.disk, window.start):
                kernel.remove(slot)
        crash.point("begin-removed")
        # Removing the last slot took the programs with it.
        with install(store.paths.pins, window.kind) as kernel:
            programs = _settled_programs(kernel, window.kind)
            state.slot = kernel.add(window)
            active, retired = kernel.planes(state.slot, window.geometry)
            state.maps = [active.id, retired.id]
            if account.available(device):
                counts = account.take(device, kernel.stats_reader(state.slot))
                account.remember(epoch, state.slot, counts)
    crash.point("begin-attached")
    if window.kind == abi.KIND_BIO:
        observer.phase(f"waiting for a moment without I/O on {device.path}", 0)
        wait_for_bios(device)
        with Kernel(store.paths.pins) as kernel:
            _wait_for_uncounted(device, partial(kernel.stats, state.slot))
            active, _ = kernel.planes(state.slot, window.geometry)
            kernel.settle(state.slot, active)
    state.programs = {name: list(program.links) for name, program in programs.items()}
    epoch.submit_missed, epoch.complete_missed = (
        programs[name].missed for name in BY_KIND[window.kind]
    )


def _settled_programs(kernel: Kernel, kind: int) -> dict[str, Program]:
    """When two looks agree: nobody is between the copies of a program that were just attached."""
    before = kernel.programs(kind)
    for _ in range(_LOOKS):
        if all(len(program.links) == 1 for program in before.values()):
            break
        time.sleep(0.002)
        now = kernel.programs(kind)
        agreed = all(now[name].missed == before[name].missed for name in now)
        before = now
        if agreed:
            break
    return before


def end(store: Store, state: DeviceState, reason: str) -> None:
    """Record a doubt: the generation is over, and every link of the device needs one resync."""
    if state.generation:
        Doubt.add(state.doubts, state.generation, reason)
    state.generation, state.resting = "", False
    store.save_device(state)
    crash.point("end-recorded")


def detach(store: Store, state: DeviceState) -> None:
    """Free the device's slot in the kernel, unless another device has it by now."""
    with durable.lock(store.kernel_lock, what="the tracking programs", wait=30):
        try:
            with Kernel(store.paths.pins) as kernel:
                if (window := kernel.windows.window(state.slot)) is None:
                    return
                if kernel.active_map(state.slot) in state.maps:
                    for slot in kernel.windows.slots(window.disk, window.start):
                        kernel.remove(slot)
        except Detached:
            return


def _refuse_rw_page(device: BlockDevice) -> None:
    btf = Btf()
    try:
        if layout.has_rw_page(btf):
            raise Refused(
                f"{device.path} can be written page by page past the block layer on this kernel",
                hint="use Linux 6.3 or newer for zram, brd and pmem devices",
            )
    finally:
        btf.close()


def wait_for_bios(device: BlockDevice) -> None:
    """Let bios end that were queued before the programs were there: no event tells their range."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    while (suspended := device.suspended) or device.in_flight:
        if time.monotonic() < deadline:
            time.sleep(0.001)
        elif suspended:
            raise BlktrackError(
                f"{device.path} was suspended for {_DRAIN_SECONDS:.0f} s, so tracking cannot begin "
                "soundly: writes may wait in it",
                hint="resume it (dmsetup resume), then try again",
            )
        else:
            raise _busy(device)


def _wait_for_uncounted(device: BlockDevice, stats: Callable[[], dict[str, int]]) -> None:
    """Let those end that the kernel does not count as in flight.

    Device-mapper counts a bio when it goes on to the device below, so not while dm-crypt encrypts
    it or dm-delay holds it (dm_target.accounts_remapped_io, 5.18), nor while it waits for the end
    of a suspension (dm_submit_bio, queue_io). Nothing tells how many there are. They are seen to
    end, though: wait until for a while none does. One that takes longer is a doubt once it ends
    (STATS.unbegun).
    """
    begin = since = time.monotonic()
    ended = stats()["early"]
    while time.monotonic() < since + _QUIET_SECONDS:
        time.sleep(0.005)
        before, ended = ended, stats()["early"]
        if ended != before:
            since = time.monotonic()
        if since > begin + _DRAIN_SECONDS:
            raise _busy(device)


def _busy(device: BlockDevice) -> BlktrackError:
    return BlktrackError(
        f"{device.path} had I/O in flight for {_DRAIN_SECONDS:.0f} s without a pause, so "
        "tracking cannot begin soundly",
        hint="try again when the device is less busy",
    )
