"""Errors a user can cause or meet: a sentence, a hint and an exit code.

An error says what happened and to what; its hint says what to do. `cli` prints both and exits with
the code; nothing else in the library prints or exits. The codes are the outside contract.
"""

from __future__ import annotations


class BlktrackError(Exception):
    """Something failed; nothing was left half-done."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(BlktrackError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class Refused(BlktrackError):
    """Doing it would risk data that is not ours, or a change that could not be seen (P1, P7)."""


class CopyFailed(BlktrackError):
    """Part of the source could not be read or of the replica not be written; it stays pending."""


class DeviceLost(CopyFailed):
    """A device was taken away, shrank or became read-only while it was in use."""


class NotTracked(BlktrackError):
    """The device is not tracked."""

    exit_code = 3


class ResyncNeeded(BlktrackError):
    """Tracking has a gap, and the caller forbade the resync that closes it."""

    exit_code = 3


class NoPoint(BlktrackError):
    """No point of the asked consistency was reached; the replica is where it was."""

    exit_code = 4


class Busy(BlktrackError):
    """Another run holds this device or replica."""

    exit_code = 6


class Interrupted(BlktrackError):
    """A signal asked the command to end; what was done so far is kept."""

    def __init__(self, message: str, *, signum: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signum
