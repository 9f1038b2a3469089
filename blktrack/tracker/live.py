"""What tracked devices are doing right now, for `top`: read again and again, disturbing nothing.

No lock is taken, no map swapped, no doubt recorded, nothing written; maps are mapped read-only.
That is sound because of how the others write (state.py): records are replaced in one step, bits are
set in a new home before they leave the old one (scan.py), counters only grow within a generation,
and a device whose tracking begins, grows or ends has its maps in place before its record names
them. What this can meet in the middle of a change is kernel maps that the record read before does
not fit: the record is then read again, and only if it is still the same is it a doubt. It is shown;
the next command that takes the lock finds it as well and records it. Two checks are left to
drains: that of the kernel's count of sectors, which takes hundreds of readings, and that of the
table of a device-mapper device.

Its cost does not follow the size of the devices: maps and sets are searched only when something
changed, and so seldom that the searches of all devices take `SCANNING` of a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from blktrack.bpf import abi
from blktrack.bpf.kernel import Detached
from blktrack.bpf.planes import Planes, stats_reader
from blktrack.bpf.programs import BY_KIND
from blktrack.bpf.view import View
from blktrack.errors import BlktrackError
from blktrack.report import TopDevice, TopReport
from blktrack.state import DeviceState, Epoch, LinkState, Store
from blktrack.sysfs import BlockDevice
from blktrack.tracker import doubt
from blktrack.tracker.generation import window_of
from blktrack.tracker.live_link import LiveLinks
from blktrack.tracker.presence import Presence
from blktrack.tracker.records import Records
from blktrack.tracker.scan import Scan, Stand, scan

SCANNING = 0.005  # share of one CPU
_AT_LEAST = 10.0  # seconds from search to search, whether anything seems to have changed or not
_TRIES = 3
_NOWHERE = Stand(0, False, 0)


class Live:
    """Everything that is tracked, or the devices of these ids."""

    def __init__(self, store: Store, only: Collection[str] = ()) -> None:
        self._records = Records(store)
        self._view = View(store.paths.pins)
        self._only = frozenset(only)
        self._devices: dict[str, LiveDevice] = {}
        self._last: float | None = None
        self.ids: dict[str, str] = {}  # of the devices last looked at, by their paths

    def look(self) -> TopReport:
        """One refresh. A device whose records cannot be read is told of, and is no error."""
        now, wall = time.monotonic(), time.time()
        self._view.refresh()
        names = [name for name in self._records.devices() if name in self._only or not self._only]
        known, self._devices, self.ids = self._devices, {}, {}
        found = []
        for name in names:
            device = known.get(name) or LiveDevice(name, self._records, self._view)
            if report := device.look(len(names)):
                self._devices[name] = device
                self.ids[report.device] = name
                found.append(report)
        for name in known.keys() - self._devices.keys():
            known[name].close()
        interval = None if self._last is None else now - self._last
        self._last = now
        costs = [cost for kind in BY_KIND if (cost := self._view.cost(kind))]
        share = sum(cost.run_ns for cost in costs) / 1e9 / interval if costs and interval else None
        return TopReport(wall, interval, share, found)

    def close(self) -> None:
        for device in self._devices.values():
            device.close()
        self._devices = {}
        self._view.close()


class LiveDevice:
    """One device, with what was seen of it before."""

    def __init__(self, name: str, records: Records, view: View) -> None:
        self._name, self._records, self._view = name, records, view
        self._path = name
        self._links = LiveLinks(records.store)
        self._presence = Presence()
        self._now: tuple[float, dict[str, int]] = (0.0, {})
        self._stands = _NOWHERE
        self._reader: tuple[int, Callable[[], Callable[[], dict[str, int]]]] | None = None
        self._forget()

    def _forget(self) -> None:
        """What follows belongs to a generation and its maps."""
        self._maps: Sequence[Planes] = ()
        self._open_for: tuple[object, ...] = ()
        self._counted: tuple[float, dict[str, int]] | None = None
        self._scan: Scan | None = None
        self._scanned: tuple[object, ...] = ()
        self._dirty_rate: float | None = None

    def look(self, devices: int) -> TopDevice | None:
        """None for one that is not tracked (any more); `devices` share the time for scans."""
        try:
            state = self._records.device(self._name)
            if state is None or not state.wanted:
                return None
            self._path = state.path
            for _ in range(_TRIES):
                reason = self._doubt(state)
                again = self._records.device(self._name) if reason else state
                if again is None or not again.wanted:
                    return None
                if again == state:
                    break
                state = again
                self._view.refresh()
            return self._report(state, reason, devices)
        except BlktrackError as error:
            return _nothing(self._path, "gap", str(error))

    def _doubt(self, state: DeviceState) -> str | None:
        """Why what the maps hold is not all that changed; None if it is, and they are open then."""
        identity = self._presence.look(state)
        device = self._presence.device
        if device is None or state.resting:
            return ""
        if not state.generation:
            return state.doubts[-1].reason if state.doubts else "tracking never began"
        if identity:
            return identity
        epoch = self._records.epoch(state.id)
        if epoch is None or epoch.generation != state.generation:
            return f"its state in {self._records.store.run(state.id)} is gone"
        try:
            return self._open(state, device) or self._lost(state, epoch)
        except Detached as error:
            return str(error)

    def _open(self, state: DeviceState, device: BlockDevice) -> str | None:
        kernel = self._view.kernel
        key = (state.generation, state.slot, state.maps, state.size, kernel)
        if self._open_for != key:
            self.close()
            window = window_of(device, state.size, state.granularity)
            self._maps = self._view.planes(state.slot, window.geometry)
            self._reader = (window.kind, stats_reader(kernel.maps["stats"], state.slot))
            self._open_for = key
        assert self._reader
        if reason := doubt.of_programs(state, self._view.programs(self._reader[0])):
            return reason
        return doubt.of_window(state, kernel, {planes.id for planes in self._maps})

    def _lost(self, state: DeviceState, epoch: Epoch) -> str | None:
        assert self._reader
        kind, read = self._reader
        submit, complete = (self._view.programs(kind)[name] for name in BY_KIND[kind])
        self._now = (time.monotonic(), read()())
        self._stands = Stand(epoch.number, epoch.clear, self._view.kernel.active_map(state.slot))
        counters, growing = self._now[1], self._presence.size > state.size
        return doubt.of_counters(counters, growing=growing) or doubt.of_misses(
            epoch, submit, complete, bio=kind == abi.KIND_BIO
        )

    def _report(self, state: DeviceState, reason: str | None, devices: int) -> TopDevice:
        links = self._records.links(state.id)
        report = _nothing(state.path, "tracking", "", state)
        if reason is None and self._reader:
            self._measure(report, state, links, devices)
        else:
            self.close()
            report.state, report.reason = "gap", reason or ""
            if state.resting:
                report.state, report.reason = "stopped", "stopped cleanly; blktrack start goes on"
            elif self._presence.device is None:
                report.state, report.reason = "absent", "no device with its identity is there"
        pending = self._pending(state) if report.state == "tracking" else None
        report.links = [self._links.look(state, link, pending) for link in links]
        return report

    def _measure(
        self, report: TopDevice, state: DeviceState, links: list[LinkState], devices: int
    ) -> None:
        assert self._reader
        at, counters = self._now
        report.epoch = self._stands.epoch
        report.written_bytes, report.writes = counters["written"], counters["writes"]
        report.losses = sum(counters[name] for name in doubt.LOSSES)
        if self._counted and at > self._counted[0]:
            seconds, before = at - self._counted[0], self._counted[1]
            report.write_rate = max(counters["written"] - before["written"], 0) / seconds
            report.writes_rate = max(counters["writes"] - before["writes"], 0) / seconds
        self._counted = self._now
        cost = self._view.cost(self._reader[0])
        report.cost_ns = cost.change_ns if cost and report.writes_rate else None
        found = self._look_at_maps(state, links, counters, devices)
        quiet = self._scanned[0] == counters["writes"]
        report.dirty_rate = 0.0 if quiet and report.writes_rate == 0 else self._dirty_rate
        report.dirty_bytes = min(found.live * state.granularity, state.size)
        report.heat = found.heat

    def _look_at_maps(
        self, state: DeviceState, links: list[LinkState], counters: dict[str, int], devices: int
    ) -> Scan:
        """The last search of the maps, or a new one if there may be news and it is time."""
        sets = [link for link in links if _is_known(state, link)]
        key = (counters["writes"], self._stands, tuple(link.id for link in sets), links)
        last, now = self._scan, time.monotonic()
        if last is not None:
            pause = last.cost * devices / SCANNING
            changed = key != self._scanned or last.shipping
            if now - last.at < (pause if changed else max(pause, _AT_LEAST)):
                return last
        folders = {link.id: self._records.store.link_run(state.id, link.id) for link in sets}
        granules = self._maps[0].geometry.granules
        found = scan(self._maps, lambda: self._stand(state), folders, granules=granules)
        if last is not None:
            new = found.live - (last.live if last.stand == found.stand else 0)
            if last.stand != found.stand:
                new = max(new, found.dirty - last.dirty)
            self._dirty_rate = max(new, 0) / (found.at - last.at)
        self._scan, self._scanned = found, key
        return found

    def _stand(self, state: DeviceState) -> Stand:
        epoch = self._records.epoch(state.id)
        active = self._view.kernel.active_map(state.slot)
        return Stand(epoch.number, epoch.clear, active) if epoch else _NOWHERE

    def _pending(self, state: DeviceState) -> dict[str, int]:
        """Bytes that each link has to ship, by its id; a link that is not in it: all of them."""
        counts = self._scan.pending if self._scan else {}
        granules = {link: count for link, count in counts.items() if count is not None}
        return {k: min(count * state.granularity, state.size) for k, count in granules.items()}

    def close(self) -> None:
        for planes in self._maps:
            planes.close()
        self._forget()


def _is_known(state: DeviceState, link: LinkState) -> bool:
    """Whether the link's sets say what it has to ship; otherwise that is everything."""
    at = link.cursor is not None and link.cursor.generation == state.generation
    return at or link.filled == state.generation


def _nothing(path: str, is_: str, reason: str, state: DeviceState | None = None) -> TopDevice:
    """A device of which nothing was measured."""
    return TopDevice(
        device=path,
        size=state.size if state else 0,
        granularity=state.granularity if state else 0,
        state=is_,
        reason=reason,
        generation=state.generation if state else "",
        epoch=0,
        write_rate=None,
        writes_rate=None,
        dirty_rate=None,
        dirty_bytes=None,
        written_bytes=0,
        writes=0,
        losses=0,
        cost_ns=None,
        heat=[],
    )
