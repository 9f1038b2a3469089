"""The links of a device as `top` shows them."""

from __future__ import annotations

import time

from blktrack.report import TopLink
from blktrack.state import DeviceState, LinkState, Store
from blktrack.tracker.status import of_replica, resync_reason

_LOOK_EVERY = 10.0  # seconds: replicas may lie on a slow file system


class LiveLinks:
    def __init__(self, store: Store) -> None:
        self._store = store
        # By link: as it was then, when, and what had happened to its replica.
        self._looked: dict[str, tuple[LinkState, float, tuple[str, str, bool]]] = {}

    def look(self, state: DeviceState, link: LinkState, pending: dict[str, int] | None) -> TopLink:
        """pending -- bytes to ship by link, those not in it have to ship everything; None: nobody
        knows."""
        cursor, reason = link.cursor, resync_reason(state, link)
        state_of = "initial" if cursor is None else "resync" if reason else "ready"
        point = cursor
        if cursor is not None:
            seen, why, at_point = self._replica(link)
            point = cursor if at_point else None
            if state_of == "ready":
                state_of, reason = seen, why
        return TopLink(
            target=link.target,
            name=link.name,
            state=state_of,
            reason=reason,
            epoch=cursor.epoch if cursor else None,
            point=point.time if point else None,
            consistency=point.consistency if point else None,
            lag_s=max(time.time() - point.time, 0.0) if point else None,
            rpo_s=None,
            lateness="",
            pending_bytes=None if pending is None else pending.get(link.id, state.size),
            sync_rate=None,
            eta_s=None,
            route=link.route,
        )

    def _replica(self, link: LinkState) -> tuple[str, str, bool]:
        assert link.cursor
        now = time.monotonic()
        if (
            (known := self._looked.get(link.id))
            and known[0] == link
            and now - known[1] < _LOOK_EVERY
        ):
            return known[2]
        try:
            found = of_replica(self._store, link, link.cursor)
        except OSError as error:  # it went away while it was looked at
            found = ("resync", str(error), True)
        self._looked[link.id] = (link, now, found)
        return found
