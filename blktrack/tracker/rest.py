"""A generation over a clean stop: a quiet device is put to rest, and later tracked on.

At rest nothing is attached. `device.json` says `resting`, durably, from the moment at which all
below is on disk until the moment at which programs, maps and sets are in place again; a death in
between leaves the one or the other. Whatever wrote to the device meanwhile is a doubt: in the same
boot, or in a later one before tracking goes on, the kernel's count of sectors written gives it
away; in a boot without blktrack, the fingerprint.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from blktrack import bitmap, crash, durable, fingerprint, mapper
from blktrack.bitfile import BitFile
from blktrack.bitmap import Words
from blktrack.state import DeviceState, Epoch, Rest, Store
from blktrack.sysfs import BlockDevice, boot_id
from blktrack.tracker import account, generation
from blktrack.tracker.tracking import BEGIN_ANEW, Gap, Tracking
from blktrack.units import SECTOR, format_size
from blktrack.use import InUse, claimed

_SETS = ("pending", "shipping", "held")  # in the order in which bits move


def put_to_rest(tracking: Tracking) -> None:
    """Store what is pending and stop tracking. InUse, and nothing changed, if it is not quiet."""
    store, state, device = tracking.store, tracking.state, tracking.device
    with claimed(device) as fd:
        if uncounted := _uncounted(device):
            raise InUse(uncounted)
        generation.wait_for_bios(device)
        written = fingerprint.sectors_written(device)
        recent = bitmap.extents(tracking.live(), state.granularity, state.size)
        swap = tracking.drain()
        places = fingerprint.places(state.size, recent)
        rest = Rest(
            generation=swap.generation,
            epoch=swap.epoch,
            time=swap.time,
            boot_id=boot_id(),
            written=written,
            places=places,
            fingerprint=fingerprint.take(fd, places),
            table=tracking.epoch.table,
        )
        for path in store.link_files(state.id, "pending"):
            _keep(store, state.id, path.parent, tracking.words)
        crash.point("stop-kept")
        store.save_rest(state.id, rest)
        crash.point("stop-described")
        if not tracking.quiet_since_swap() or fingerprint.sectors_written(device) != written:
            raise InUse("it was written while it was being stopped")
        state.resting, state.in_use = True, ""
        store.save_device(state)
        crash.point("stop-recorded")
        generation.detach(store, state)


def resume(store: Store, state: DeviceState, device: BlockDevice) -> None:
    """Track on in the generation of a device at rest. Gap, recorded, if it is not as it was left.

    Programs come first: what is written from then on is marked, what was before is found.
    """
    rest = store.rest(state.id)
    try:
        if rest is None or rest.generation != state.generation:
            raise Gap("what it was stopped with is gone")
        if device.size < state.size or device.start != state.start:
            raise Gap("it was resized or moved while it was stopped")
        if uncounted := _uncounted(device):
            raise Gap(uncounted)
        _restore(store, state)
        with claimed(device) as fd:
            epoch = Epoch(state.generation, number=rest.epoch)
            window = generation.window_of(device, state.size, state.granularity)
            generation.occupy(store, state, device, window, epoch)
            store.save_epoch(state.id, epoch)
            crash.point("start-attached")
            if reason := _changed(device, rest, fd) or _remapped(rest, epoch.table):
                raise Gap(reason)
            state.resting, state.diskseq = False, device.diskseq
            if not _is_at(state.path, device):  # it may be another disk's by now
                state.path = device.path
            state.boot_id, state.release = boot_id(), os.uname().release
            store.save_device(state)
            crash.point("start-recorded")
    except (Gap, InUse) as error:
        generation.end(store, state, f"stopped, and when tracking was to go on {error}")
        store.drop_rest(state.id)
        raise Gap(f"{device.path}: {state.doubts[-1].reason}", hint=BEGIN_ANEW) from error
    store.drop_rest(state.id)


def _restore(store: Store, state: DeviceState) -> None:
    """The sets of every link, from what was kept. Gap if that is damaged."""
    words = bitmap.words_for(bitmap.granules_for(state.size, state.granularity))
    for path in store.lib(state.id).glob("*.rest"):
        found, folder = _kept(path), store.link_run(state.id, path.stem)
        for name in ("shipping", "held"):  # what they had is in what was kept
            BitFile(folder / name, words, create=True).close()
        # Drains find a link by `pending`, so that comes last.
        with BitFile(folder / "pending", words, create=True) as pending:
            index = bitmap.nonzero(found)
            bitmap.or_into(pending.reserve(index), found, index)
    BitFile(store.run(state.id) / "settling", words, create=True).close()
    crash.point("start-restored")


def _changed(device: BlockDevice, rest: Rest, fd: int) -> str:
    """What tells that the device was written since it was put to rest; "" if nothing does."""
    before = rest.written if rest.boot_id == boot_id() else 0
    if count := fingerprint.sectors_written(device) - before:
        size = format_size(abs(count) * SECTOR)
        return f"{size} had been written to it" if count > 0 else "its counters had begun anew"
    try:
        if fingerprint.take(fd, rest.places) != rest.fingerprint:
            return "its content was another"
    except OSError as error:
        return f"it could not be read ({error.strerror or error})"
    return ""


def _remapped(rest: Rest, table: list[str] | None) -> str:
    """What tells of another table under it; "" if nothing does."""
    goes_on = mapper.goes_on if rest.boot_id == boot_id() else mapper.is_alike
    if rest.table is None or table is None or goes_on(rest.table, table):
        return ""
    return "it had another device-mapper table"


def _is_at(path: str, device: BlockDevice) -> bool:
    try:
        return os.stat(path).st_rdev == os.makedev(*device.number)
    except OSError:
        return False


def _uncounted(device: BlockDevice) -> str:
    """Why the count of sectors is no witness; "" if it is."""
    if device.request_based and not account.available(device):
        return "the kernel keeps no count of its writes (queue/iostats is 0)"
    return ""


def _keep(store: Store, device: str, folder: Path, words: int) -> None:
    """All that a link has to ship, in a file that survives the boot."""
    found = np.zeros(words, dtype=np.uint64)
    for name in _SETS:
        if name == "held" and not (folder / name).exists():  # most links have none
            continue
        with BitFile(folder / name, words) as part:
            bitmap.or_into(found, part.words, part.nonzero())
    data = zlib.compress(found.astype("<u8").tobytes(), 1)
    raw = zlib.crc32(data).to_bytes(4, "little") + data
    durable.write_bytes(store.lib(device) / f"{folder.name}.rest", raw)


def _kept(path: Path) -> Words:
    """Such a file's set. Gap if it is damaged."""
    raw = path.read_bytes()
    if zlib.crc32(raw[4:]).to_bytes(4, "little") != raw[:4]:
        raise Gap(f"{path} was damaged")
    return np.frombuffer(zlib.decompress(raw[4:]), dtype="<u8").astype(np.uint64)
