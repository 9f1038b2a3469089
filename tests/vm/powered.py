"""Run inside a machine whose power will be cut: python -m tests.vm.powered

After the boot the replicas are judged as the cut before left them, tracking is started as the
service does, and the first sync of each must be a resync, or an incremental one after a clean stop.
Then syncs go on under writes until the file `cut` says that it is time, by Job.when:

    first     in the first sync of a source
    later     in an increment of it
    idle      between two of them
    stop      while it is put to rest, or after that
    foreign   after others wrote to it, to whom blktrack is nothing
    last      after the first syncs: it is enough
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from blktrack import sync
from blktrack.config import Paths
from blktrack.errors import Busy, NoPoint
from blktrack.options import Options
from blktrack.state import Store
from blktrack.tracker import service, tracker
from tests import sectors
from tests.blockdev import Silent, read_image, wait_until
from tests.vm.compiled import compile_once
from tests.vm.cutting import HOME, XFS, Cut, Writer, assemble, mount, named
from tests.vm.power import FAR, Events, Job, Writes, look
from tools.vm.initramfs import SHARE


class Guest:
    def __init__(self, share: Path) -> None:
        self.share, self.job = share, Job.read(share)
        self.events = Events(share)
        self.cut = Cut(share, self.job)
        self.first = self.job.boot == 1
        self.store = Store(Paths.of_host())
        mount(self.job.replicas.values())
        self.sources = tuple(self.job.replicas)
        self.devices = assemble(self.sources, first=self.first)
        self.writers = {
            source: Writer(path, Writes(share, source)) for source, path in self.devices.items()
        }

    def note(self, kind: str, source: str, **more: object) -> None:
        self.events.add(self.job.boot, kind, source, **more)

    def replica(self, source: str) -> str:
        """Where it can be read. That of the other host lies in the share."""
        match self.job.replicas[source]:
            case "ext4":
                return str(HOME / f"{source}.img")
            case "xfs":
                return str(XFS / f"{source}.img")
            case "device":
                return named("target")
        return str(self.share / FAR / f"{source}.img")

    def target(self, source: str) -> str:
        """As blktrack calls it."""
        if self.job.replicas[source] == "ssh":
            return f"{self.job.far}/{source}.img"
        return self.replica(source)

    def look(self) -> None:
        """At the replicas in here, as the cut left them. The host looks at that of the other."""
        for source in self.sources:
            if self.job.replicas[source] != "ssh":
                target, boot = self.replica(source), self.job.boot - 1
                found = look(target, self.store.paths, source, self.share, boot)
                self.note("found", source, state=found.state, fault=found.fault)
                assert not found.fault, f"{source} at {target}: {found}"

    def track(self) -> None:
        """Start, as at boot, and see that what was stopped is believed, and nothing else."""
        if self.first:
            for path in self.devices.values():
                tracker.track(self.store, path, None)
            return
        for source, path in self.devices.items():
            (done,) = service.start(self.store, path)
            self.note("start", source, action=done.action, reason=done.reason)
            wanted, why = self._wanted(source)
            assert done.action == wanted, f"{source}: {done} after {why}"
            if why == "foreign":
                assert "its content was another" in done.reason, done

    def _wanted(self, source: str) -> tuple[str, str]:
        """What the start of a source must do, and for which event before."""
        last = self.events.of(source, "begin", "stopped", "foreign", "writes")[-1]
        return "resumed" if last["kind"] == "stopped" else "began", last["kind"]

    def sync(self, source: str) -> str:
        """One sync, however often the keeper of one that was cut off is still there; its mode."""
        path, target = self.devices[source], self.target(source)
        while True:
            self.note("begin", source)
            try:
                report = sync.sync(self.store, path, target, Options(), Silent())[0]
            except Busy:
                time.sleep(1)
                continue
            except NoPoint as error:
                self.note("no point", source, why=str(error))
                return ""
            more = {"mode": report.mode, "point": report.point, "reason": report.reason}
            self.note("end", source, **more)
            return report.mode

    def first_sync(self, source: str) -> None:
        """The one that tells what blktrack makes of the cut."""
        started = self.events.of(source, "start")
        resumed = bool(started) and started[-1]["action"] == "resumed"
        had = bool(self.events.of(source, "end"))
        armed = self.job.when == "first" and source == self.job.source
        with self.cut.armed() if armed else contextlib.nullcontext():
            while not (mode := self.sync(source)):
                pass
        if resumed:
            assert mode in ("incremental", "nothing"), f"{mode} of {source} after a clean stop"
        else:
            wanted = ("resync",) if had else ("initial", "resync")
            assert mode in wanted, f"{mode} of {source}"
            reason = self.events.of(source, "end")[-1]["reason"]
            # Not by what lies behind that, as a pending set that is gone.
            known = "rebooted" in reason or "its content was another" in reason
            assert known or not had, f"resync of {source}: {reason}"
        if not self.job.busy:
            self._compare(source)

    def _compare(self, source: str) -> None:
        image = read_image(self.devices[source])
        found = sectors.differing(image, read_image(self.replica(source))[: len(image)])
        assert not len(found), f"{source}: {len(found)} sectors differ after its first sync"

    def write(self) -> None:
        for source, writer in self.writers.items():
            self.note("writes", source)
            writer.start()

    def work(self) -> None:
        job = self.job
        if job.when == "foreign":
            self.foreign()
        if not self.first:
            self.look()
        self.track()
        if job.busy:
            self.write()
        for source in (*(each for each in self.sources if each != job.source), job.source):
            self.first_sync(source)
        if job.when == "last":
            self.cut.now()
        elif not job.busy:
            self.write()
        match job.when:
            case "idle":
                self.await_writes()
                self.cut.now()
            case "stop":
                self.stop()
            case "later":
                with self.cut.armed():
                    while True:
                        self.await_writes()
                        assert self.sync(job.source) in ("", "incremental")
        self.cut.await_it()

    def await_writes(self) -> None:
        """So many that an increment of them has more than one extent."""
        writer = self.writers[self.job.source]
        count = writer.count
        wait_until(lambda: writer.count > count + 20, "some writes")

    def stop(self) -> None:
        """The clean stop of all, that of job.source last."""
        for writer in self.writers.values():
            writer.stop()
        for source in (
            *(each for each in self.sources if each != self.job.source),
            self.job.source,
        ):
            armed = source == self.job.source
            if armed and self.job.at == "stop-recorded":  # what is recorded counts
                self.note("stopped", source)
            with self.cut.armed() if armed else contextlib.nullcontext():
                (done,) = service.stop(self.store, self.devices[source])
            assert done.action == "stopped", done
            self.note("stopped", source)
        self.cut.now()

    def foreign(self) -> None:
        """Somebody writes to one source, and blktrack does not run."""
        source = self.job.source
        self.note("foreign", source)
        writer = self.writers[source]
        writer.start()
        self.await_writes()
        self.cut.now()
        self.cut.await_it()


if __name__ == "__main__":
    compile_once()
    Guest(Path(SHARE)).work()
