"""Install the systemd unit that tracks on at boot and stops cleanly at shutdown, ordered against
the mounts of the devices tracked now. Run it again after a tracked device was given a new name, as
mkfs does; track and untrack renew it by themselves.

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


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["show", "install", "remove"])
    parser.add_argument(
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
        print(systemd.unit())
        print(f"# {systemd.UNIT}.d/devices.conf")
        print(systemd.ordering(devices), end="")
    return 0
