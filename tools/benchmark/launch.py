"""Runs a command and prints its time and peak memory as JSON: launch.py COMMAND...

A small process of its own, because Linux starts a child's peak memory at that of the process it was
forked from. What the command prints goes to standard error, its exit code is this one's. Needs
nothing but Python.
"""

import json
import os
import sys
import time

begin = time.monotonic()
pid = os.posix_spawnp(
    sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)]
)
_, status, usage = os.wait4(pid, 0)
print(
    json.dumps(
        {
            "seconds": time.monotonic() - begin,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
        }
    )
)
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
