"""Moving what a retired map holds into the sets, with what no program saw complete.

Completions that no program saw are covered, without a doubt, by what is known of their begin:

- On a bio-based device by the table of what is in flight, in which they stay: each drain takes its
  entries as changed.
- On a request-based one by the submitted planes, where the kernel's own count tells of it
  (account.py). A completion that went unseen belongs to a write submitted in this epoch or before:
  `settling` keeps what was, until nothing is in flight. Nothing in flight after a swap means that
  all earlier epochs' writes have ended (a dispatcher still between its issue event and the count of
  `inflight` keeps the swap waiting, as both lie in one RCU section; where the driver may sleep, the
  epoch kept in any case covers it).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from blktrack import bitmap, crash, mapper
from blktrack.bitfile import BitFile
from blktrack.bitmap import Indices
from blktrack.bpf import abi
from blktrack.tracker import account, doubt
from blktrack.units import SECTOR

if TYPE_CHECKING:
    from blktrack.tracker.tracking import Tracking

_NONE: Indices = np.empty(0, dtype=np.int64)


def absorb(device: Tracking) -> str | None:
    """Merge the retired map into every link's pending set, then clear it; or why that is no use."""
    assert device.kernel
    epoch, slot, retired = device.epoch, device.state.slot, device.retired
    # First: a completion that is missed from here on is found below or by the next drain.
    idle = device.device.disk.in_flight == 0
    submit, complete = device.program_pair()
    known, now = account.known(epoch, slot), device.counts()
    # After the swap: another table by now may have come before it, one that comes later is found by
    # whoever looks next.
    table = mapper.table(device.device)
    if reason := (
        doubt.of_counters(device.kernel.stats(slot), growing=device.grown)
        or doubt.of_misses(epoch, submit, complete, bio=device.bio)
        or doubt.of_account(known, now, bio=device.bio)
        or doubt.of_table(epoch.table, table)
    ):
        return reason
    found = retired.nonzero()
    missed = complete.missed_since(epoch.complete_missed) > 0
    if not missed and known and now:
        missed = now.unended > known.unended
    with BitFile(device.store.run(device.state.id) / "settling", device.words) as settling:
        for path in device.store.link_files(device.state.id, "pending"):
            with BitFile(path, device.words) as pending:
                _merge(device, abi.COMPLETED, pending, found)
                if device.bio:
                    _add_in_flight(device, pending)
                elif missed:
                    _merge(device, abi.SUBMITTED, pending, found)
                    index = settling.nonzero()
                    bitmap.or_into(pending.reserve(index), settling.words, index)
            crash.point("drain-merged")
        _tell_captures(device, found)
        # `inflight` leaves out requests that are done but wait for the softirq that ends them.
        settled = idle and (now is None or now.exact)
        if known and now:
            settled = settled and now.unbegun >= known.unbegun
            if not missed:  # never less: what is in flight makes it seem so
                account.remember(epoch, slot, known.at_least(unbegun=now.unbegun))
        if settled:
            settling.clear()
        crash.point("drain-settled")
        if not device.bio:
            _merge(device, abi.SUBMITTED, settling, found)
    crash.point("drain-settling")
    retired.clear(found)
    crash.point("drain-cleared")
    unsure = epoch.submit_unsure and not settled
    epoch.submit_unsure = unsure or submit.missed_since(epoch.submit_missed) > 0
    epoch.table = table
    return None


def _merge(device: Tracking, plane: int, target: BitFile, found: list[Indices]) -> None:
    words = target.reserve(*device.retired.spans(plane, found[plane]))
    device.retired.merge_into(plane, words, found[plane])


def _tell_captures(device: Tracking, found: list[Indices]) -> None:
    """Captures under way ask for all that was submitted since their swap."""
    for path in device.store.link_files(device.state.id, "racing"):
        # One that ends now takes its set away.
        with contextlib.suppress(FileNotFoundError), BitFile(path, device.words) as racing:
            for plane in (abi.SUBMITTED, abi.COMPLETED):
                _merge(device, plane, racing, found)


def _add_in_flight(device: Tracking, target: BitFile) -> None:
    """Take as changed what a bio-based device has in flight, and all that seems to be."""
    assert device.kernel
    window, size = device.window, device.state.granularity
    ranges = []
    for entry in device.kernel.in_flight(window.disk):
        start = int(entry["sector"]) * SECTOR - window.start
        first, last = max(start, 0), min(start + int(entry["bytes"]), window.length)
        if first < last:
            begin = first // size
            ranges.append((begin, bitmap.granules_for(last, size) - begin))
    runs = [
        (first // bitmap.BITS, bitmap.words_for(first + count) - first // bitmap.BITS)
        for first, count in ranges
    ]
    words = target.reserve(_NONE, runs)
    for first, count in ranges:
        bitmap.set_range(words, first, count)
