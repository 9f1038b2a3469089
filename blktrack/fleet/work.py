"""What the process of a link does: what `blktrack sync` of it would do, told to the parent."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from blktrack.device import device_id, source
from blktrack.errors import BlktrackError, NotTracked, UsageError
from blktrack.fleet.child import Sender
from blktrack.fleet.outcome import Job
from blktrack.options import Options
from blktrack.policy import Policy
from blktrack.state import Store
from blktrack.sync import sync
from blktrack.tracker import tracker


@dataclass(frozen=True)
class Settings:
    """What a round is to do."""

    store: Store
    policy: Policy
    guard: Callable[[Options], AbstractContextManager[None]]  # has signals end what these are for
    adjust: Callable[[Options], None] = lambda options: None  # over what the policy says
    jobs: int | None = None  # devices at a time, over the policy's
    time_limit: float | None = None  # seconds for all of it


def work(
    settings: Settings, job: Job, left: float | None, sender: Sender, ready: Callable[[], None]
) -> None:
    """Sync a link, and send what came of it; every error is sent as well.

    left -- seconds of the time limit of the round, if it has one.
    """
    options = job.link.options()
    settings.adjust(options)
    if left is not None and (options.time_limit is None or left < options.time_limit):
        options.time_limit, options.time_left = settings.time_limit, left
    with settings.guard(options):
        ready()
        try:
            _ensure_tracked(settings, job, sender)
            report, _ = sync(settings.store, job.link.device, job.link.target, options, sender)
        except BlktrackError as error:
            sender.send(kind="error", error=str(error), hint=error.hint, exit=error.exit_code)
        except Exception as error:
            words, hint = _unforeseen(error)
            sender.send(kind="error", error=words, hint=hint, exit=1)
        else:
            sender.send(kind="report", **report.as_json())


def _ensure_tracked(settings: Settings, job: Job, sender: Sender) -> None:
    """The policy says that this device is to be tracked; a hand that ended it had a reason."""
    path, store = job.device.path, settings.store
    otherwise = (
        f"or write enabled = false into [device.{job.device.name}] of {settings.policy.path}"
    )
    try:
        device = source(path)
    except UsageError as error:
        raise BlktrackError(
            f"the device is away ({error})", hint=f"connect it, {otherwise}"
        ) from error
    state = store.device(device_id(device))
    if state is None:
        report = tracker.track(store, path, job.device.granularity)
        sender.send(kind="tracked")
        for warning in report.warnings:
            sender.warn(warning)
    elif not state.wanted:
        raise NotTracked(
            f"{path} was untracked by hand", hint=f"run blktrack track {path}, {otherwise}"
        )


def _unforeseen(error: Exception) -> tuple[str, str]:
    """Words and hint for what is no error of ours."""
    if isinstance(error, MemoryError):
        return f"out of memory {error}".strip(), "free some, or track with a larger --granularity"
    if isinstance(error, OSError):
        return str(error) or type(error).__name__, "see the kernel log if this is unexpected"
    where = traceback.extract_tb(error.__traceback__)[-1]
    words = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
    return words, "a defect of blktrack: blktrack sync of this replica alone shows all of it"
