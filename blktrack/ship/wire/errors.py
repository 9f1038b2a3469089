"""How a connection fails."""

from __future__ import annotations

from blktrack.errors import BlktrackError, CopyFailed


class ConnectionLost(CopyFailed):
    """The other side is gone, or silent for too long. What it held durably it still holds."""

    def __init__(self, peer: str, why: str, *, silent: bool = False) -> None:
        super().__init__(
            f"the connection to {peer} was lost: {why}",
            hint="run the command again: it goes on where this ended",
        )
        self.silent = silent  # it did not end, but nothing came any more


class ProtocolError(BlktrackError):
    """The other side says what it may not say, or what this version does not understand."""

    def __init__(self, peer: str, what: str, *, hint: str = "") -> None:
        super().__init__(
            f"{peer} breaks the protocol: {what}",
            hint=hint or "use the same version of blktrack on both hosts",
        )


class NoKeeper(ProtocolError):
    """Something else speaks where a keeper should: a login that is no shell, say."""

    def __init__(self, peer: str, said: str) -> None:
        super().__init__(
            peer,
            f"it says {said} instead of starting blktrack recv",
            hint="let the login there start blktrack recv --serve, and print little else",
        )
