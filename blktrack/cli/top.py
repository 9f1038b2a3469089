"""Show live what tracked devices and their replicas do: write and dirty-block rates, where the
dirty blocks lie, lag against what the policy promises, bytes to go. Disturbs no sync.

  blktrack top
  blktrack top /dev/sdb /dev/vg0/data --interval 5
  blktrack top --once
  blktrack top --json --interval 10 >> top.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable

from blktrack.bpf import libbpf
from blktrack.cli.common import emit, interruptible, paths, store
from blktrack.cli.outlook import Outlook
from blktrack.errors import BlktrackError, Interrupted, NotTracked
from blktrack.report import TopReport
from blktrack.tracker.live import Live
from blktrack.tracker.tracker import find_any

EXITS = {
    "3": "a device that is named is not tracked",
    "128+N": "ended by signal N, with the terminal as it was",
}
_LEAST, _MOST = 0.1, 3600.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "devices", metavar="DEVICE", nargs="*", help="only these; all that are tracked otherwise"
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="from reading to reading (default: 1)",
    )
    parser.add_argument("--once", action="store_true", help="one look, an interval long, and exit")
    parser.add_argument("--plain", action="store_true", help="lines, as without a terminal")
    parser.add_argument("--json", action="store_true", help="a JSON object on a line each time")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="have the kernel time the programs meanwhile (key c): some 45 ns more for each run",
    )


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not _LEAST <= seconds <= _MOST:
        raise argparse.ArgumentTypeError(f"must be {_LEAST:g} to {_MOST:g} seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    outlook = Outlook(store(), paths().policy)
    with contextlib.closing(Live(store(), _ids(args.devices))) as live, _Timing() as timing:

        def look() -> TopReport:
            report = live.look()
            outlook.tell(report, live.ids)
            return report

        if args.cost:
            timing.begin()
        try:
            if args.json or args.plain or args.once or not _on_terminal():
                _print(args, look, outlook)
            else:
                _display(args, look, outlook, timing)
        except Interrupted as end:  # the usual way to leave it
            return end.exit_code
    return 0


def _ids(names: list[str]) -> list[str]:
    found = []
    for name in names:
        state, _ = find_any(store(), name)
        if not state.wanted:
            raise NotTracked(f"{name} is not tracked", hint=f"run blktrack track {name} first")
        found.append(state.id)
    return found


def _print(args: argparse.Namespace, look: Callable[[], TopReport], outlook: Outlook) -> None:
    """Rates need two readings: the first is not printed."""
    if not args.json:
        from blktrack.tui import plain  # needs rich

    with interruptible("top", ""):
        due = time.monotonic()
        look()
        if outlook.problem:
            print(f"blktrack: warning: {outlook.problem}", file=sys.stderr)
        while True:
            due = max(due + args.interval, time.monotonic())
            time.sleep(max(due - time.monotonic(), 0.0))
            report = look()
            if args.json:
                emit(report)
            else:
                print("\n".join(plain.lines(report)), flush=True)
            if args.once:
                return


def _on_terminal() -> bool:
    from blktrack.tui.screen import usable

    return usable(sys.stdin.fileno(), sys.stdout.fileno())


def _display(
    args: argparse.Namespace, look: Callable[[], TopReport], outlook: Outlook, timing: _Timing
) -> None:
    from blktrack.tui import look as looks
    from blktrack.tui.app import App
    from blktrack.tui.board import View
    from blktrack.tui.screen import Screen

    shapes = looks.glyphs()
    screen = Screen(sys.stdin.fileno(), sys.stdout.fileno(), shapes)
    view = View(interval=args.interval, measuring=args.cost)
    app = App(screen, shapes, view, read=look, measure=timing.switch)
    if outlook.problem:
        app.tell(outlook.problem)
    app.run(sys.stdin.fileno())


class _Timing:
    """The kernel's timing of program runs, on at most for as long as this command lasts."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def switch(self, on: bool) -> str:
        """Switch it; what to tell the user."""
        if not on:
            self.close()
            return "the kernel times the programs no longer, unless others asked for it"
        try:
            self.begin()
        except BlktrackError as error:
            return str(error)
        return "the kernel times each run of the programs, which costs some 45 ns more"

    def begin(self) -> None:
        try:
            self._fd = libbpf.enable_stats()
        except OSError as error:
            raise BlktrackError(
                f"the kernel does not time programs: {error.strerror}",
                hint="leave out --cost; everything else is shown without it",
            ) from error

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> _Timing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
