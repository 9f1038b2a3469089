"""Freeze the file systems of a device around a body of code: a point under it is what they left.

    with Freeze(device, partial(file_systems, device), must_write=[...]) as freeze:
        ...                                  # nobody writes
    report.freeze_s = freeze.seconds         # reached only if they were frozen all the time

In order: the `pre` hooks; a look at what is mounted, for a hook may have made a file system
read-only that cannot be frozen; a flush, so that the freeze itself has little to write; the freeze;
the body; the thaw; the `post` hooks. Thaw and `post` hooks come on every way out. A process that is
killed is thawed for (see `watchdog`), but then no `post` hook runs. Once all are frozen they are
listed again, and once more after the thaw: what was mounted in between would not have stood still.

A file system that lies on another, through a loop device over a file say, has to be frozen before
it, for its last writes need it. It was mounted after it: so they are frozen in reverse order of
mounting, and thawed in that order. Should it ever be the wrong one the freeze hangs up to the cap
and fails.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from blktrack import linux
from blktrack.errors import NoPoint, Refused
from blktrack.observer import FREEZE
from blktrack.quiesce import hooks
from blktrack.quiesce.find import FileSystem
from blktrack.quiesce.watchdog import Watchdog
from blktrack.sysfs import BlockDevice

CAP, CAP_MOST = 2.0, 60.0  # seconds that writers may have to wait, if not told, and at most
HOOK_LIMIT = 60.0

_FLUSHES = 4  # at most
_RETRY = 0.05  # seconds between two tries at what somebody else has frozen
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY)  # of no file system of its kind


class FreezeExpired(NoPoint):
    """The file systems were thawed before the body ended: what it read is no point."""


class Freeze:
    """See above. `listing` says what is to be frozen; without file systems only the hooks run.

    One that cannot be frozen, as no vfat can, is Refused, or with `lenient` only flushed: then it
    is in `unfrozen`, and may write on.

    `must_write` are the paths that the body writes to: Refused if one needs a file system that
    would be frozen. NoPoint if the freeze cannot be had in `cap` seconds or a `pre` hook fails.
    FreezeExpired if the body took longer than `cap` or somebody else thawed; the error of a body
    that failed goes first.
    """

    def __init__(
        self,
        device: BlockDevice,
        listing: Callable[[], Sequence[FileSystem]],
        *,
        lenient: bool = False,
        must_write: Sequence[Path] = (),
        cap: float = CAP,
        pre: Sequence[str] = (),
        post: Sequence[str] = (),
        hook_limit: float = HOOK_LIMIT,
        tell: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.device = device
        self.listing, self.lenient = listing, lenient
        self.file_systems: list[FileSystem] = []
        self.unfrozen: list[FileSystem] = []
        self.must_write = must_write
        self.cap = cap
        self.pre, self.post, self.hook_limit = pre, post, hook_limit
        self._tell = tell  # phases, as to an Observer
        self.warnings: list[str] = []  # of post hooks that failed: the point is good all the same
        self._watchdog: Watchdog | None = None
        self._held = contextlib.ExitStack()  # all that is frozen
        self._hooked = contextlib.ExitStack()  # that, and the post hooks

    @property
    def seconds(self) -> float:
        """How long writers had to wait: from the first freeze to the last thaw, or to now."""
        nothing = len(self.unfrozen) == len(self.file_systems)
        if nothing or self._watchdog is None or not self._watchdog.began:
            return 0.0
        return (self._watchdog.ended or time.monotonic()) - self._watchdog.began

    def check(self) -> None:
        """FreezeExpired if the body may as well stop here. Costs nothing."""
        if self._watchdog is not None and (why := self._watchdog.lost):
            raise FreezeExpired(
                f"the freeze of {self._names} ended too early: {why}",
                hint="try again when there is less load, or allow a longer freeze",
            )

    def __enter__(self) -> Self:
        self._look()
        with contextlib.ExitStack() as hooked:
            for command in reversed(self.post):
                hooked.callback(self._after, command)
            for command in self.pre:
                self._before(command)
            if self.pre:
                self._look()
            self._held = hooked.enter_context(contextlib.ExitStack())
            if self._hold_all():
                # Mounted since they were listed: once more, with it among them.
                self._look()
                self._refuse(self._hold_all())
            self._hooked = hooked.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._hooked:
            self._held.close()
            if error is None:
                self.check()
                # After the thaw, so that writers need not wait for it; a hook may mount again.
                self._refuse(self._added())

    @property
    def _names(self) -> str:
        return ", ".join(str(one) for one in self.file_systems)

    def _look(self) -> None:
        self.file_systems = list(reversed(self.listing()))
        for path in self.must_write:
            for one in self.file_systems:
                if one.is_under(path):
                    raise Refused(
                        f"the {one} holds {path}, which is written to while it is frozen",
                        hint="keep that on another file system, or take a crash-consistent point",
                    )

    def _before(self, command: str) -> None:
        """What it was to prepare is not prepared; nothing else is wrong, and nothing was done."""
        self._tell(f"pre hook {command!r}")
        if why := hooks.run(command, "pre", self.device.path, self.hook_limit):
            raise NoPoint(
                f"the pre hook {command!r} failed: {why}",
                hint="run it by hand to see what it needs; the post hooks have run",
            )

    def _after(self, command: str) -> None:
        self._tell(f"post hook {command!r}")
        if why := hooks.run(command, "post", self.device.path, self.hook_limit):
            self.warnings.append(f"the post hook {command!r} failed: {why}")

    def _hold_all(self) -> list[FileSystem]:
        """Freeze what was listed. If there is more by then it says what, and nothing is frozen."""
        with contextlib.ExitStack() as held:
            if self.file_systems:
                self._hold(held)
            if not (added := self._added()):
                self._held.push(held.pop_all())
        return added

    def _added(self) -> list[FileSystem]:
        known = {one.number for one in self.file_systems}
        return [one for one in self.listing() if one.number not in known]

    def _refuse(self, added: list[FileSystem]) -> None:
        if added:
            names = ", ".join(f"the {one}" for one in added)
            raise NoPoint(
                f"mounted while {self.device.path} was to be frozen, and not frozen: {names}",
                hint="try again: it is found in time then",
            )

    def _hold(self, held: contextlib.ExitStack) -> None:
        fds = []
        for one in self.file_systems:
            fds.append(one.open())
            held.callback(os.close, fds[-1])
        # A module that the body imports would be written to the cache that Python keeps beside it.
        held.callback(setattr, sys, "dont_write_bytecode", sys.dont_write_bytecode)
        sys.dont_write_bytecode = True
        flushed, deadline = False, math.inf
        while True:
            with contextlib.ExitStack() as attempt:
                self._watchdog = watchdog = Watchdog(fds, self.cap)
                attempt.callback(watchdog.release)
                watchdog.start()
                if not flushed:
                    self._tell("writing back file systems before a freeze")
                    self._flush(fds)
                    flushed, deadline = True, time.monotonic() + self.cap
                watchdog.wait_ready()
                self._tell(FREEZE)
                if self._freeze_all(watchdog, deadline):
                    held.push(attempt.pop_all())
                    return
            # Meanwhile nothing is frozen: whoever froze one may be waiting for another.
            time.sleep(_RETRY)

    def _freeze_all(self, watchdog: Watchdog, deadline: float) -> bool:
        """False if one is frozen by somebody else and there is time to try again."""
        self.unfrozen = []
        for index, one in enumerate(self.file_systems):
            try:
                watchdog.freeze(index)
            except OSError as error:
                if self.lenient and error.errno in _CANNOT:
                    self.unfrozen.append(one)
                    continue
                if error.errno == errno.EBUSY and time.monotonic() < deadline:
                    return False
                raise self._why_not(one, error) from error
            self.check()
        return True

    def _why_not(self, one: FileSystem, error: OSError) -> NoPoint | Refused:
        if error.errno in _CANNOT:
            point = shlex.quote(str(one.points[0]))
            return Refused(
                f"the {one} cannot be frozen: {error.strerror}",
                hint="unmount it; or have it read-only for that long, with --pre-freeze"
                f" 'mount -o remount,ro {point}' --post-freeze 'mount -o remount,rw {point}';"
                " or take a crash-consistent point",
            )
        if error.errno == errno.EBUSY:
            return NoPoint(
                f"the {one} is frozen by somebody else, for longer than {self.cap:g} s",
                hint=f"if nobody needs that: fsfreeze --unfreeze {one.points[0]}",
            )
        return NoPoint(
            f"the {one} could not be frozen: {error.strerror}", hint="see the kernel's log"
        )

    def _flush(self, fds: list[int]) -> None:
        """Write back, and again what was written meanwhile, while that shrinks."""
        last = math.inf
        for _ in range(_FLUSHES):
            began = time.monotonic()
            for one, fd in zip(self.file_systems, fds, strict=True):
                try:
                    linux.sync_filesystem(fd)
                except OSError as error:
                    raise NoPoint(
                        f"the {one} could not be written back: {error.strerror}",
                        hint="see the kernel's log",
                    ) from error
            took = time.monotonic() - began
            if took < self.cap / 20 or took > last * 0.7:
                return
            last = took
