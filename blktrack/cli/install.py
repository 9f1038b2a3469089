"""A schedule that runs `blktrack sync --all` again and again, by cron or by a timer of systemd.
No two runs work on one replica, and nothing is told while all is well. What fails is told by cron's
mail, once, then every four hours and when it changes; a timer leaves it in the journal.

The first copy of a large device may take longer than that: the next runs leave it to the one that
is at it, say so once, and sync all others.

  blktrack install cron
  blktrack install systemd --every 15m
  blktrack install cron --print
  blktrack install cron --remove
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType

from blktrack import systemd
from blktrack.cli.common import paths
from blktrack.cli.fleet import policy_to_follow
from blktrack.cli.remind import duration
from blktrack.errors import Refused
from blktrack.schedule import EVERY, Instance, cron, timer

_KINDS: dict[str, ModuleType] = {"cron": cron, "systemd": timer}
_ACTIONS = {
    "cron": "Write a file into /etc/cron.d.",
    "systemd": "Write a service and a timer, enable the timer, and start it where systemd runs.",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, what in _ACTIONS.items():
        action = actions.add_parser(
            name,
            help=what.partition(",")[0].rstrip(".").lower(),
            description=f"{what}\n\nblktrack install {name} --every 5m\n"
            f"blktrack install {name} --remove",
        )
        one = action.add_mutually_exclusive_group()
        one.add_argument(
            "--print", action="store_true", help="show what would be written, and write nothing"
        )
        one.add_argument("--remove", action="store_true", help="take back what was installed")
        action.add_argument(
            "--every",
            type=duration,
            metavar="TIME",
            default=EVERY,
            help="from the start of one run to that of the next (default 5m)",
        )


def run(args: argparse.Namespace) -> int:
    instance, kind = _instance(), _KINDS[args.action]
    files = [] if args.remove else kind.listed(instance, args.every)
    if args.print:
        for file in files:
            print(f"# {file.path}\n{file.text}")
    elif args.remove:
        _tell(kind.remove(instance), "removed", "nothing was installed")
    else:
        policy_to_follow()
        for name, other in _KINDS.items():
            if name != args.action and other.is_installed(instance):
                raise Refused(
                    f"blktrack install {name} was done: both would only find each other busy",
                    hint=f"blktrack install {name} --remove first",
                )
        _tell(kind.install(instance, args.every), "written", "it is as installed")
        if instance.root is None and not systemd.is_installed():
            print(
                "blktrack: note: over a boot tracking goes on only with blktrack service install",
                file=sys.stderr,
            )
    return 0


def _instance() -> Instance:
    root = os.environ.get("BLKTRACK_ROOT")
    return Instance(paths().pins.name, systemd.command(), Path(root).resolve() if root else None)


def _tell(files: list[Path], what: str, none: str) -> None:
    for path in files:
        print(f"{path}: {what}")
    if not files:
        print(none)
