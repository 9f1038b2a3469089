"""A replica on another host, with the face of one on this host."""

from blktrack.ship.remote.replica import RemoteReplica

__all__ = ["RemoteReplica"]
