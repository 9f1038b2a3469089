"""One round of every link of the policy.

Those of one device follow each other, as they read the same disk; devices go side by side.
Processes share nothing but the locks that every command takes.
"""

from __future__ import annotations

import contextlib
import select
import signal
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol

from blktrack.errors import Busy, NoPoint
from blktrack.fleet.child import Child, Message
from blktrack.fleet.outcome import jobs_of, judge, last_points, outcome, worst
from blktrack.fleet.turns import Turns
from blktrack.fleet.work import Settings, work
from blktrack.options import Options
from blktrack.report import FleetReport, LinkOutcome, SyncReport
from blktrack.units import format_promise

_TICK = 0.2  # seconds


class FleetWatcher(Protocol):
    """Who watches a round. Links go by their names in the policy."""

    def phase(self, link: str, name: str, total: int) -> None:
        """A phase of `total` bytes begins."""

    def done(self, link: str, count: int) -> None:
        """So many bytes of the phase are dealt with."""

    def warn(self, link: str, message: str) -> None:
        """Something went wrong that the operator has to see to."""

    def ended(self, found: LinkOutcome) -> None:
        """It was synced, or it was not."""

    def tick(self) -> None:
        """Some time has passed."""


def sync_all(settings: Settings, watcher: FleetWatcher) -> tuple[FleetReport, bool]:
    """Sync every enabled link; also whether a device was tracked that had not been.

    What fails of one link is told in its outcome; so is that another run is still at it.
    """
    begun = time.monotonic()
    rounds = Rounds(settings, watcher)
    with settings.guard(rounds.ending):
        rounds.run()
    judge(settings.store, rounds.jobs, rounds.outcomes)
    code = worst(found.exit for found in rounds.outcomes)
    return FleetReport(rounds.outcomes, code, time.monotonic() - begun), rounds.tracked


@dataclass
class Running:
    """A link that is being synced."""

    number: int
    child: Child
    device: deque[int]  # the links of its device that are still to come
    slot: contextlib.ExitStack


class Rounds:
    def __init__(self, settings: Settings, watcher: FleetWatcher) -> None:
        self.settings, self.watcher = settings, watcher
        self.jobs = jobs = jobs_of(settings.policy)
        self.outcomes = [outcome(job) for job in jobs]
        self.ending = Options()  # signals set its `stop`
        self.tracked = False
        self._turns = Turns(settings.store.paths.run, settings.jobs or settings.policy.jobs)
        self._waiting: deque[deque[int]] = deque()  # by device
        self._running: dict[int, Running] = {}  # by descriptor
        self._begun = time.monotonic()
        self._poll = select.poll()

    def run(self) -> None:
        try:
            self._line_up()
            while self._running or self._waiting:
                self._step()
        finally:
            for running in self._running.values():  # whoever watches has failed
                running.child.tell(signal.SIGTERM)
                running.child.reap()
            self._turns.close()

    def _line_up(self) -> None:
        """Every link that no other run has. Of a device those that follow already go first: a first
        copy may take hours."""
        known = last_points(self.settings.store)
        for _, each in groupby(range(len(self.jobs)), lambda number: self.jobs[number].device.name):
            numbers = deque(number for number in each if self._is_ours(number))
            if numbers:
                first = {n for n in numbers if self.jobs[n].link.target not in known}
                self._waiting.append(deque(sorted(numbers, key=first.__contains__)))

    def _is_ours(self, number: int) -> bool:
        found = self.outcomes[number]
        if why := self._turns.take(found.name):
            self._fail(number, why, "wait for it to end", Busy.exit_code)
            self.watcher.ended(found)
        return not why

    def _step(self) -> None:
        if self.ending.stop.is_set():
            self._end()
        elif self._left() == 0.0:
            self._give_up()
        while self._waiting and (slot := self._turns.slot()):
            self._begin(self._waiting.popleft(), slot)
        for fd, _ in self._poll.poll(_TICK * 1000):
            self._hear(fd)
        self.watcher.tick()

    def _begin(self, numbers: deque[int], slot: contextlib.ExitStack) -> None:
        """The next link of a device."""
        number = numbers.popleft()
        try:
            child = Child.begin(partial(work, self.settings, self.jobs[number], self._left()))
        except OSError as error:
            words = f"no process can be had for it: {error.strerror}"
            self._fail(number, words, "free memory, or raise the limit of processes", 1)
            self._ended(number, numbers, slot)
            return
        self._running[child.fd] = Running(number, child, numbers, slot)
        self._poll.register(child.fd, select.POLLIN)

    def _hear(self, fd: int) -> None:
        running = self._running[fd]
        number = running.number
        messages, more = running.child.read()
        for message in messages:
            self._take(number, message)
        if more:
            return
        self._poll.unregister(fd)
        del self._running[fd]
        code, found = running.child.reap(), self.outcomes[number]
        if found.report is None and not found.error:
            self._died(number, code)
        self._ended(number, running.device, running.slot)

    def _ended(self, number: int, numbers: deque[int], slot: contextlib.ExitStack) -> None:
        """The other links of the device go before other devices."""
        slot.close()
        self._turns.let_go(self.outcomes[number].name)
        self.watcher.ended(self.outcomes[number])
        if numbers:
            self._waiting.appendleft(numbers)

    def _take(self, number: int, message: Message) -> None:
        found = self.outcomes[number]
        match message.pop("kind"):
            case "phase":
                self.watcher.phase(found.name, message["name"], message["total"])
            case "done":
                self.watcher.done(found.name, message["count"])
            case "warn":
                found.warnings.append(message["message"])
                self.watcher.warn(found.name, message["message"])
            case "tracked":
                self.tracked = True
            case "report":
                found.report = SyncReport(**message)
            case "error":
                self._fail(number, message["error"], message["hint"], message["exit"])

    def _fail(self, number: int, error: str, hint: str, code: int) -> None:
        found = self.outcomes[number]
        found.error, found.hint, found.exit = error, hint, code

    def _died(self, number: int, code: int) -> None:
        """Without a word: killed, by the kernel for want of memory perhaps."""
        how = f"was killed by {_signal(-code)}" if code < 0 else f"ended with code {code}"
        hint = "see the kernel log; nothing is lost, the next sync goes on where it stopped"
        self._fail(number, f"its process {how}", hint, 1)

    def _left(self) -> float | None:
        """Seconds of the time limit."""
        limit = self.settings.time_limit
        return None if limit is None else max(limit - (time.monotonic() - self._begun), 0.0)

    def _end(self) -> None:
        """What runs ends as it would by itself; what has not begun does not."""
        signum = self.ending.signum
        words = f"it was not begun: {_signal(signum)} had ended the run"
        self._leave_out(words, "run it again", 128 + signum)
        for running in self._running.values():
            running.child.tell(signum)

    def _give_up(self) -> None:
        """The time is over: what runs knows of that itself."""
        limit = format_promise(self.settings.time_limit or 0.0)
        words = f"it was not begun: the time limit of {limit} was over"
        self._leave_out(words, "run it again, or give it more time", NoPoint.exit_code)

    def _leave_out(self, words: str, hint: str, code: int) -> None:
        """All that has not begun, of devices that are worked on too."""
        running = [one.device for one in self._running.values()]
        for numbers in (*self._waiting, *running):
            for number in numbers:
                self._fail(number, words, hint, code)
                self._turns.let_go(self.outcomes[number].name)
                self.watcher.ended(self.outcomes[number])
            numbers.clear()
        self._waiting.clear()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
