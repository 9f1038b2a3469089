"""Say what this host can do, each failure with its remedy. Exit code 1 if anything fails.

blktrack doctor
"""

from __future__ import annotations

import argparse

from blktrack import doctor
from blktrack.cli.common import add_json, emit
from blktrack.cli.progress import Watcher
from blktrack.config import Paths


def arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with Watcher(quiet=False) as watcher:
        watcher.phase("trying out what this host can do", 0)
        report = doctor.examine(Paths.from_environment())
    if args.json:
        emit(report)
    else:
        for check in report.checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:9} {check.detail}")
            if not check.ok:
                print(f"      {'':9} -> {check.remedy}")
    return 0 if report.ok else 1
