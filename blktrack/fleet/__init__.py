"""`sync --all`: every replica of the policy, each in a process of its own.

`rounds` decides which of them run when, `turns` which run has which of them, `child` is the process
of one and the pipe through which it reports, `work` what it does, `outcome` what came of it.
"""

from blktrack.fleet.outcome import trouble
from blktrack.fleet.rounds import FleetWatcher, sync_all
from blktrack.fleet.work import Settings

__all__ = ["FleetWatcher", "Settings", "sync_all", "trouble"]
