"""Say what this host can do, each failure with its remedy. Exit code 1 if anything fails.

blktrack doctor
"""

from __future__ import annotations

import argparse
import contextlib

from blktrack import doctor
from blktrack.cli.common import add_json, emit, paths, store
from blktrack.cli.progress import Watcher
from blktrack.errors import BlktrackError
from blktrack.policy import read
from blktrack.ship.address import is_remote


def arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with Watcher(quiet=False) as watcher:
        watcher.phase("trying out what this host can do", 0)
        report = doctor.examine(paths(), elsewhere=_has_replicas_elsewhere())
    if args.json:
        emit(report)
    else:
        for check in report.checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:9} {check.detail}")
            if not check.ok:
                print(f"      {'':9} -> {check.remedy}")
    return 0 if report.ok else 1


def _has_replicas_elsewhere() -> bool:
    """By policy and state, as far as these can be read: not everybody may."""
    policy, _ = read(paths().policy)
    if any(is_remote(link.target) for link in policy.links):
        return True
    with contextlib.suppress(BlktrackError, OSError):
        known = store()
        return any(is_remote(link.target) for one in known.ids() for link in known.links(one))
    return False
