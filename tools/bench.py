"""The benchmark table: every figure measured in this run, with its target and its raw runs.

Ratios are medians of pairs taken side by side, A B B A ..., because machines are noisy. Works on
loop devices in memory, needs root and up to 10 GiB of it; cleans up after itself, interrupted or
not.

  tools/bench.py                  everything, to the terminal and to bench.json
  tools/bench.py fio cost         only these
  tools/bench.py --quick sync     fewer and shorter runs
  tools/bench.py remote           all figures of a replica on another host
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import blktrack
from blktrack.errors import BlktrackError
from blktrack.units import format_duration
from tools.benchmark import cost, load, points, remote, replicate, scale, staged, watch
from tools.benchmark.figure import Figure
from tools.benchmark.lab import Failed, Lab

GROUPS: list[ModuleType] = [load, cost, replicate, scale, points, staged, watch, remote]
NAMES = [name for group in GROUPS for name in group.NAMES]
WHOLE = {"remote": set(remote.NAMES)}  # what stands for several of them
console = Console(highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--json", type=Path, default="bench.json", help="(default: %(default)s)")
    parser.add_argument("--memory", type=Path, default="/dev/shm", help="(default: %(default)s)")
    parser.add_argument(
        "--disk", type=Path, default="/var/tmp", help="for what must survive (default: %(default)s)"
    )
    args = parser.parse_args()
    args.names = {name for word in args.names for name in WHOLE.get(word, {word})}
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no figure {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    return args


def measure(args: argparse.Namespace, cleanup: contextlib.ExitStack) -> list[Figure]:
    """The figures asked for; one that could not be measured says why."""
    wanted = set(args.names or NAMES)
    lab = Lab(cleanup, args.memory, args.disk)
    figures: list[Figure] = []
    for group in GROUPS:
        if not (names := wanted & set(group.NAMES)):
            continue
        console.print(f"measuring {', '.join(n for n in group.NAMES if n in names)} …")
        begun = time.monotonic()
        try:
            for figure in group.measure(lab, names, quick=args.quick):
                figures.append(figure)
                console.print(f"  {escape(line(figure))}")
        except (Failed, BlktrackError) as error:
            missing = sorted(names - {figure.name for figure in figures})
            figures += [Figure(name, "", note=f"not measured: {error}") for name in missing]
            console.print(f"  failed: {escape(str(error))}")
        console.print(f"  {format_duration(time.monotonic() - begun)}")
    return figures


def line(figure: Figure) -> str:
    value = figure.measured
    if value is None:
        return f"{figure.name}: {'none' if figure.runs else 'not measured'}"
    return f"{figure.name}: {figure.show(value)}"


def show(figures: list[Figure]) -> None:
    table = Table(title="blktrack, measured in this run", title_justify="left")
    table.add_column("name")
    table.add_column("figure")
    for heading in ("target", "measured", "min – max", "met"):
        table.add_column(heading, justify="right", no_wrap=True)
    verdicts = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}
    for figure in figures:
        value, values = figure.measured, figure.values
        table.add_row(
            figure.name,
            figure.what,
            figure.target,
            "–" if value is None else figure.show(value),
            f"{figure.show(min(values))} – {figure.show(max(values))}" if values else "",
            verdicts[figure.met],
        )
    console.print(table)
    for figure in figures:
        console.print(f"[bold]{figure.name}[/]: {escape(figure.note)}")
        for name, value in figure.parts.items():
            if not isinstance(value, list | dict):
                console.print(f"    {name} {value}")


def save(path: Path, figures: list[Figure], args: argparse.Namespace) -> None:
    host: dict[str, Any] = {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }
    found = {
        "version": blktrack.__version__,
        "time": time.time(),
        "quick": args.quick,
        "host": host,
        "figures": [figure.as_json() for figure in figures],
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    args = arguments()
    if os.geteuid() != 0:
        print("the benchmark makes loop devices and tracks them: run it as root", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    # As after an installation, whatever was edited since.
    compileall.compile_dir(str(Path(blktrack.__file__).parent), quiet=2)
    with contextlib.ExitStack() as cleanup:
        try:
            figures = measure(args, cleanup)
        except KeyboardInterrupt:
            print("interrupted; cleaned up", file=sys.stderr)
            return 130
    show(figures)
    save(args.json, figures, args)
    return 0 if all(figure.runs for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
