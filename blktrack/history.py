"""What each run of a link did, as LIB/devices/ID/history.jsonl: an object a line, newest last.

A run appends its line in one write, under RUN/devices/ID/history.lock; readers take no lock. What
is true after a death at any step:

- append: before the write the run is not on record, as none is that is killed; after it, it is. A
  line that was cut off, by a full disk or a power cut, is not looked at, and the next one begins a
  line of its own.
- trim: the file is replaced as a whole, the old one or the new one.

Each line has the totals of its link, which so go on when old lines are trimmed: the last line of a
link always stays. A line that cannot be read is left out and counted; the totals then go on from
the line before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from blktrack import crash
from blktrack.durable import lock, sync_directory, write_bytes
from blktrack.errors import BlktrackError, Busy
from blktrack.report import Run, SendReport, SyncReport, Totals
from blktrack.state import Store

KEEP = 90 * 86400.0  # seconds
MOST = 10_000  # lines of a device
_PATIENCE = 5.0  # seconds for others to append a line
_LONGEST_ERROR = 2000  # characters

_FIGURES = sorted({f.name for f in dataclasses.fields(SyncReport)})
_ADDED = ("rounds", "bytes_changed", "bytes_shipped", "bytes_zeroed", "bytes_wire", "freeze_s")

# Parts of a line; in a text its quotation marks would be escaped.
_NO_FAILURE = (b'"exit": 0,', f'"exit": {Busy.exit_code},'.encode())

T = TypeVar("T")
Key = tuple[str, str]  # of a link


def key(link: str, target: str) -> Key:
    """What tells one link of a device from another: a first run may fail before it has a name."""
    return (target, "" if target else link)


@dataclass
class Found:
    runs: list[Run]  # newest last
    damaged: int  # lines left out


def read(store: Store, device: str) -> Found:
    """All runs of a device that are on record. BlktrackError if the file cannot be read."""
    lines = _lines(_content(_path(store, device)))
    runs = [run for line in lines if (run := _parse(line))]
    return Found(runs, len(lines) - len(runs))


def newest_first(store: Store, device: str) -> Iterator[Run]:
    """The runs of a device, each parsed when it is asked for. BlktrackError as `read`."""
    for line in reversed(_lines(_content(_path(store, device)))):
        if run := _parse(line):
            yield run


def latest(store: Store, device: str, wanted: set[Key], *, failed: bool = False) -> dict[Key, Run]:
    """The last run of each of these links, if there was one. It reads no further back than these.
    BlktrackError as `read`.

    failed -- the last that failed, and did not give way to another.
    """
    content = _content(_path(store, device))
    runs = ((its, _last(content, its, failed=failed)) for its in wanted)
    return {its: run for its, run in runs if run is not None}


def _last(content: bytes, of: Key, *, failed: bool) -> Run | None:
    """Found from the end by the name as a run writes it: of thousands of lines few are parsed."""
    name = json.dumps(of[0] or of[1]).encode()
    end = content.rfind(b"\n") + 1
    while (at := content.rfind(name, 0, end)) >= 0:
        begin = content.rfind(b"\n", 0, at) + 1
        line, end = content[begin : content.index(b"\n", at)], begin
        if failed and any(well in line for well in _NO_FAILURE):
            continue
        run = _parse(line)
        if run and key(run.link, run.target) == of and not (failed and _is_well(run)):
            return run
    return None


def _is_well(run: Run) -> bool:
    return run.exit in (0, Busy.exit_code)


@dataclass
class Recorder:
    """To be told of one run, as long as it is under way."""

    run: Run

    def __call__(self, report: SyncReport | SendReport) -> None:
        """It went well."""
        for name in _FIGURES:
            setattr(self.run, name, getattr(report, name))

    def wire(self, count: int) -> None:
        """So many bytes have crossed the network until now, whatever becomes of it."""
        self.run.bytes_wire = count


@contextlib.contextmanager
def recorded(
    store: Store,
    device: str,
    command: str,
    *,
    link: str = "",
    target: str = "",
    keep: float = KEEP,
    warn: Callable[[str], None],
) -> Iterator[Recorder]:
    """Put on record what is done inside, however it ends. Gives what to be told of that.

    link, target -- one of them, by which the command knows its link.
    keep -- seconds for which runs of this device are kept.
    warn -- is told if a run that went well cannot be recorded: that fails nothing.
    """
    run = Run(command, link, target, begun=time.time(), duration_s=0.0, exit=0, error="")
    begun = time.monotonic()
    try:
        yield Recorder(run)
    except BaseException as error:
        run.exit, run.error = _outcome(error)
        run.duration_s = time.monotonic() - begun
        raise
    finally:
        crash.point("history-begun")
        _identify(store, device, run)
        try:
            _append(store, device, run, keep)
        except (BlktrackError, OSError) as error:
            if (
                not run.exit
            ):  # one that failed has an error to tell, of the same cause as like as not
                warn(f"this run is missing in the history: {error}")


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit code as the command line has it, and the text."""
    code = 1
    match error:
        case BlktrackError():
            code = error.exit_code
        case KeyboardInterrupt():
            code = 130
        case BrokenPipeError():
            code = 141
    text = str(error) or type(error).__name__
    return code, text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}..."


def _identify(store: Store, device: str, run: Run) -> None:
    """Give it both its name and its target, as far as there is a link by now."""
    with contextlib.suppress(BlktrackError):  # who cannot read its state has said so
        for link in store.links(device):
            if link.target == run.target if run.target else link.name == run.link:
                run.link, run.target = link.name, link.target
                return


def _append(store: Store, device: str, run: Run, keep: float) -> None:
    path = _path(store, device)
    what = "the history of the device"
    with lock(store.run(device) / "history.lock", what=what, wait=_PATIENCE):
        content = _content(path)
        run.totals = _sum(_totals(content, key(run.link, run.target)), run)
        added = f"{json.dumps(run.as_json())}\n".encode()
        if content and not content.endswith(b"\n"):
            added = b"\n" + added
        _write(path, added)
        crash.point("history-appended")
        _trim(path, content + added, keep)


def _write(path: Path, added: bytes) -> None:
    """All of it or, unless the host dies meanwhile, nothing."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        if os.write(fd, added) < len(added):
            os.ftruncate(fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fdatasync(fd)
    finally:
        os.close(fd)
    if not size:
        sync_directory(path.parent)


def _totals(content: bytes, of: Key) -> Totals:
    for line in reversed(_lines(content)):
        if (run := _parse(line)) and key(run.link, run.target) == of:
            return run.totals
    return Totals()


def _sum(before: Totals, run: Run) -> Totals:
    total = dataclasses.replace(before, runs=before.runs + 1)
    if run.exit == Busy.exit_code:
        total.busy += 1
    elif run.exit:
        total.failures += 1
        total.failures_in_a_row += 1
    else:
        total.failures_in_a_row = 0
        total.succeeded = run.begun + run.duration_s
        total.last_freeze_s = run.freeze_s
        total.resyncs += run.mode == "resync"
    for name in _ADDED:
        setattr(total, name, getattr(total, name) + getattr(run, name))
    return total


def _trim(path: Path, content: bytes, keep: float) -> None:
    """Old lines go, but for the last of each link."""
    lines = _lines(content)
    if not _is_due(lines):
        return
    runs = [(line, run) for line in lines if (run := _parse(line))]
    last = {key(run.link, run.target): number for number, (_, run) in enumerate(runs)}
    stay = set(last.values())
    oldest, first = time.time() - keep, len(runs) - MOST
    kept = [
        line
        for number, (line, run) in enumerate(runs)
        if (number >= first and run.begun >= oldest) or number in stay
    ]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(line + b"\n" for line in kept))


def _is_due(lines: list[bytes]) -> bool:
    """With the first run of a day, or if there are a tenth too many: looking for what is too old
    takes reading all of them."""
    days = {int(run.begun // 86400) for line in lines[-2:] if (run := _parse(line))}
    return len(days) > 1 or len(lines) > MOST + MOST // 10


def _path(store: Store, device: str) -> Path:
    return store.lib(device) / "history.jsonl"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise BlktrackError(
            f"cannot read {path}: {error.strerror}",
            hint=f"make it readable, or move {path} away",
        ) from error


def _lines(content: bytes) -> list[bytes]:
    """Those that are whole, in their order; what follows the last line feed is not."""
    return [line for line in content.split(b"\n")[:-1] if line]


def _parse(line: bytes) -> Run | None:
    """None if it is damaged."""
    try:
        raw = json.loads(line)
        run = _known(Run, {**raw, "totals": _known(Totals, raw["totals"])})
        time.localtime(run.begun)  # or an error, if no clock can have told it
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, OSError):
        return None
    return run


def _known(kind: type[T], raw: Any) -> T:
    """Keys that are not known, a newer version's, are left out. TypeError if one that is known has
    a value of another kind, or is missing; ValueError for NaN and what no counter holds."""
    if not isinstance(raw, dict):
        raise TypeError(raw)
    values = {name: raw[name] for name in _KINDS[kind] if name in raw}
    for name, value in values.items():
        if not isinstance(value, _KINDS[kind][name]):
            raise TypeError(name)
        if isinstance(value, (int, float)) and not abs(value) < 1 << 63:
            raise ValueError(name)
    return kind(**values)


def _kinds(kind: type) -> dict[str, Any]:
    """By name of a field, what its value may be: a number without a fraction is one, too."""
    hints = get_type_hints(kind)
    return {name: hint | int if isinstance(0.5, hint) else hint for name, hint in hints.items()}


_KINDS: dict[type, dict[str, Any]] = {kind: _kinds(kind) for kind in (Run, Totals)}
