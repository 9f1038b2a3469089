"""How consistent is what was read.

A sync reads its extents after the swap at instant T. If no change was submitted to the source
between T and the end of the last read, then what was read is the source as it was at T, and the
replica, which held the previous point, now holds T:

- a change that completed before T is in the epoch that T closed, so it was read, now or earlier;
- a change in flight at T may be on the medium in whole, in part or not at all, and what was read
  may hold any of these: so may a disk after a power cut at T;
- there was no change after T.

That is `crash` consistency. The submitted plane proves it: a change is marked there before the
driver can see it, so if the plane is empty once the last read has ended, none began in time to be
read. A program run that the kernel skipped, or any counted loss, spoils the proof, and so does
another swap: then the point is only `none`.
"""

from __future__ import annotations

from blktrack.state import Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker.opening import hold
from blktrack.tracker.tracking import Gap, Swap, Tracking


def consistency(store: Store, device: BlockDevice, number: str, swap: Swap) -> str:
    """`crash` or `none`; to be asked as soon as the last read of the source has ended."""
    state = store.device(number)
    if state is None:
        return "none"
    try:
        with hold(store, number, device.path), Tracking(store, state, device) as tracking:
            same = tracking.epoch.number == swap.epoch and state.generation == swap.generation
            return "crash" if same and tracking.quiet_since_swap() else "none"
    except Gap:
        return "none"
