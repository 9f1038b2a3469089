"""Why a delta is refused. Whatever the reason, what was read of it leads to no point."""

from __future__ import annotations

import errno
import os

from blktrack.errors import BlktrackError


class DeltaError(BlktrackError):
    """A delta cannot be read or written."""


class DeltaForeign(DeltaError):
    """It is no delta at all."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__(
            f"this is not a delta: it begins with {beginning.hex(' ')}",
            hint="give it what blktrack wrote, from its first byte, neither packed nor encrypted",
        )


class DeltaTruncated(DeltaError):
    """It ends before its trailer does."""

    def __init__(self, offset: int, within: str) -> None:
        super().__init__(
            f"the delta ends after {offset} bytes, within {within}"
            if offset
            else "the delta is empty",
            hint="its sender stopped or the connection broke: see the sender's message, then send "
            "it again",
        )
        self.offset = offset


class DeltaDamaged(DeltaError):
    """A checksum or the digest of the whole does not hold."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the delta is damaged: {what}",
            hint="it was changed on its way or where it was kept: send it again",
        )


class DeltaNewer(DeltaError):
    """It is whole, and has something in it that this version does not understand."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the delta needs a newer blktrack: it has {what}",
            hint="upgrade blktrack on this host",
        )


class DeltaInvalid(DeltaError):
    """Its checksums hold, and it says what no delta may say."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the delta breaks its format: {what}",
            hint="do not use it: it was made by something else, or by a faulty blktrack",
        )


class DeltaBroken(DeltaError):
    """The file or pipe it goes through fails; `errno` says how."""

    def __init__(self, doing: str, error: OSError) -> None:
        if error.errno == errno.EPIPE:
            message = "whoever was to take the delta went away"
            hint = "see the message of the receiver or of the connection, then send it again"
        else:
            message = f"cannot {doing} the delta: {os.strerror(error.errno or errno.EIO)}"
            hint = "see to the file or connection that it goes through, then send it again"
        super().__init__(message, hint=hint)
        self.errno = error.errno or 0
