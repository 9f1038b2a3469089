"""Print figures for Prometheus: of devices, replicas and runs, in its text format. With --output
they go to a file for the node exporter's textfile collector, which is there as a whole or not at
all. What cannot be had is left out, with a warning, and blktrack_up is 0 then.

  blktrack metrics
  blktrack metrics --output /var/lib/prometheus/node-exporter/blktrack.prom
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blktrack.cli.common import paths, store
from blktrack.durable import lock, write_bytes
from blktrack.errors import UsageError
from blktrack.metrics import collect

EXITS = {"6": "another run is writing figures"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write to this file, named *.prom"
    )


def run(args: argparse.Namespace) -> int:
    if args.output is None:
        sys.stdout.buffer.write(_figures())
        return 0
    _check(args.output)
    with lock(paths().run / "metrics.lock", what="writing figures"):
        # Who reads it is not root.
        write_bytes(args.output, _figures(), mode=0o644)
    return 0


def _figures() -> bytes:
    figures = collect(store())
    for warning in figures.warnings:
        print(f"blktrack: warning: {warning}", file=sys.stderr)
    return figures.text


def _check(file: Path) -> None:
    if file.suffix != ".prom":
        raise UsageError(
            f"{file} is not named *.prom, and would not be read",
            hint="name it blktrack.prom, say",
        )
    if not file.parent.is_dir():
        raise UsageError(
            f"{file.parent} is no folder",
            hint="name that of the node exporter's --collector.textfile.directory",
        )
