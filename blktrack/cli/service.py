"""The systemd unit that tracks on at boot and stops cleanly at shutdown, ordered against the mounts
of the devices tracked now. Install it again after a tracked device was given a new name, as mkfs
does; track and untrack renew it by themselves.

  blktrack service show
  blktrack service install
  blktrack service remove
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blktrack import systemd
from blktrack.cli.common import store
from blktrack.tracker.tracker import wanted_devices

_ACTIONS = {
    "show": "Print the unit and its drop-in, and change nothing.",
    "install": "Write the unit, unless a package brought it, and its drop-in, and enable it.",
    "remove": "Take back what install did. Devices stay tracked until the next boot.",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, what in _ACTIONS.items():
        action = actions.add_parser(
            name,
            help=what.partition(".")[0].lower(),
            description=f"{what}\n\nblktrack service {name}",
        )
        action.add_argument(
            "--to", type=Path, metavar="DIR", default=systemd.WHERE, help="(default: %(default)s)"
        )


def run(args: argparse.Namespace) -> int:
    devices = wanted_devices(store())
    if args.action == "remove":
        systemd.remove(args.to)
        print(f"{args.to / systemd.UNIT}: removed")
    elif args.action == "install":
        for path in systemd.install(devices, args.to):
            print(f"{path}: written")
    else:
        ordering = systemd.ordering(devices)
        print(systemd.unit())
        print(f"# {systemd.UNIT}.d/devices.conf")
        print(ordering, end="")
    return 0
