"""Named places at which a process can be made to die, to see that a death there loses nothing.

`BLKTRACK_CRASH=NAME` kills the process with SIGKILL when it comes to that place, `NAME:3` when it
comes there for the third time. Without it a place costs one comparison.
"""

from __future__ import annotations

import os
import signal

_name, _, _turn = os.environ.get("BLKTRACK_CRASH", "").partition(":")
_left = int(_turn) if _turn.isdigit() else 1


def point(name: str) -> None:
    """Die here if that was asked for. `name` is a literal, by which tests find all places."""
    global _left
    if name == _name:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # it is sent, and may take a moment to arrive
