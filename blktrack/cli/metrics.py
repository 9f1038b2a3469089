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

from blktrack.cli.common import store
from blktrack.durable import lock, write_bytes
from blktrack.errors import UsageError
from blktrack.metrics import collect

_PATIENCE = 10.0  # seconds for another run to write the file


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write to this file, named *.prom"
    )


def run(args: argparse.Namespace) -> int:
    of = store()
    if args.output is not None:
        _check(args.output)
    figures = collect(of)
    for warning in figures.warnings:
        print(f"blktrack: warning: {warning}", file=sys.stderr)
    if args.output is None:
        sys.stdout.buffer.write(figures.text)
        return 0
    with lock(of.paths.run / "metrics.lock", what="the file of figures", wait=_PATIENCE):
        # Who reads it is not root.
        write_bytes(args.output, figures.text, mode=0o644)
    return 0


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
