"""A replica on another host, with the face of one on this host."""

from blktrack.ship.remote.replica import FarStage, RemoteReplica
from blktrack.ship.remote.wire import Wire

__all__ = ["FarStage", "RemoteReplica", "Wire"]
