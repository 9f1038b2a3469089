"""Makes docs/top.svg, the picture of `blktrack top` in the README: real devices, written to and
replicated while it looks, drawn as on a terminal of a fixed size. Needs root; cleans up after
itself.

  tools/picture.py
  tools/picture.py --seconds 60 --out /tmp/top.svg
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.segment import Segment, Segments

from blktrack import linux
from blktrack.bpf import kernel, libbpf
from blktrack.cli.outlook import Outlook
from blktrack.config import Paths
from blktrack.state import Store
from blktrack.tracker.live import Live
from blktrack.tui import board, look
from blktrack.tui.trend import Trend
from blktrack.units import KIB, MIB

WIDTH, HEIGHT = 122, 20
DISK = 512 * MIB
BLOCK = 4 * KIB
POLICY = """
[device.orders]
path = "{orders}"
[device.orders.replica.near]
target = "{folder}/orders.img"
rpo = "1m"
[device.orders.replica.far]
target = "{folder}/orders-2.img"
rpo = "1h"
[device.mail]
path = "{mail}"
[device.mail.replica.near]
target = "{folder}/mail.img"
rpo = "30s"
rpo-error = "1h"
"""


def run(*command: str, ok: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in ok:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def blktrack(*words: str) -> None:
    run(sys.executable, "-m", "blktrack", *words)


def sync(disk: str, target: str) -> subprocess.Popen[bytes]:
    """One that goes on beside; what comes too early is refused, and the next one comes."""
    words = ("sync", disk, target, "--quiet")
    return subprocess.Popen([sys.executable, "-m", "blktrack", *words], stderr=subprocess.DEVNULL)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


class Writer(threading.Thread):
    """Writes at a pace that rises and falls, mostly near one place that moves along the device."""

    def __init__(self, path: str, rate: float, seconds: float, spread: float) -> None:
        super().__init__(daemon=True)
        self._path, self._rate, self._seconds, self._spread = path, rate, seconds, spread
        self._random = random.Random(path)
        self.ended = threading.Event()

    def run(self) -> None:
        buffer = linux.Buffer(BLOCK)
        buffer.view[:8] = b"blktrack"
        fd = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
        try:
            begun = time.monotonic()
            while not self.ended.wait(0.1):
                phase = 2 * math.pi * (time.monotonic() - begun) / self._seconds
                pace = self._rate * (1.1 + math.sin(phase)) * self._random.uniform(0.6, 1.2)
                for _ in range(int(pace / 10)):
                    place = phase / 12 + self._random.gauss(0.0, self._spread)
                    os.pwrite(fd, buffer.view, int(place % 1.0 * DISK) // BLOCK * BLOCK)
        finally:
            os.close(fd)


@contextlib.contextmanager
def writing(*writers: Writer) -> Iterator[None]:
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        for writer in writers:
            writer.ended.set()
        for writer in writers:
            writer.join()


def take(folder: Path, cleanup: contextlib.ExitStack, seconds: int) -> list[look.Line]:
    """The last screen of so many seconds."""
    disks = []
    for name in ("orders", "mail", "scratch"):
        image = folder / f"{name}.disk"
        with image.open("wb") as file:
            file.truncate(DISK)
        disk = run("losetup", "--find", "--show", str(image))
        cleanup.callback(run, "losetup", "--detach", disk, ok=(0, 1))
        blktrack("track", disk)
        cleanup.callback(run, sys.executable, "-m", "blktrack", "untrack", disk, ok=(0, 1, 2, 3))
        disks.append(disk)
    orders, mail, scratch = disks
    paths = Paths.from_environment()
    paths.policy.parent.mkdir(parents=True)
    paths.policy.write_text(POLICY.format(orders=orders, mail=mail, folder=folder))
    for disk, target in ((orders, "orders"), (orders, "orders-2"), (mail, "mail")):
        blktrack("sync", disk, f"{folder}/{target}.img", "--quiet")
    store, trends, view = (
        Store(paths),
        dict[str, Trend](),
        board.View(chosen=orders, measuring=True),
    )
    outlook = Outlook(store, paths.policy)
    writers = (
        Writer(orders, 260, 70, 0.02),
        Writer(mail, 120, 110, 0.15),
        Writer(scratch, 40, 20, 0.4),
    )
    live = cleanup.enter_context(contextlib.closing(Live(store)))
    syncs: list[subprocess.Popen[bytes]] = []
    cleanup.callback(end, syncs)
    cleanup.callback(os.close, libbpf.enable_stats())
    with writing(*writers):
        for second in range(seconds + 1):
            if second % 40 == 0 or second == seconds - 8:  # as cron would
                syncs.append(sync(orders, f"{folder}/orders.img"))
            if second == seconds // 2:
                syncs.append(sync(mail, f"{folder}/mail.img"))
            report = live.look()
            outlook.tell(report, live.ids)
            for found in report.devices:
                if found.write_rate is not None:
                    trends.setdefault(found.device, Trend()).add(report.time, found.write_rate)
            time.sleep(1)
    return board.draw(report, trends, view, look.UNICODE, width=WIDTH, height=HEIGHT)


def svg(lines: list[look.Line]) -> str:
    """As on a dark terminal; no font is fetched from anywhere."""
    console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    for line in lines:
        console.print(Segments([*line, Segment.line()]), end="")
    own = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)
    own = re.sub(r"<!--.*?-->\s*", "", own, flags=re.S).replace("Fira Code", "DejaVu Sans Mono")
    return console.export_svg(title="blktrack top", code_format=own, unique_id="top")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=300, help="of load (default: 300)")
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/backup"), help="made, and removed (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/top.svg"))
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("the picture is of real devices: run it as root")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    with contextlib.ExitStack() as cleanup:
        folder = args.dir  # its name is in the picture
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            sys.exit(f"{folder} cannot be made: {error.strerror}; choose another --dir")
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ["BLKTRACK_ROOT"] = str(folder / "state")
        cleanup.callback(lambda: kernel.remove(Paths.from_environment().pins))
        lines = take(folder.resolve(), cleanup, args.seconds)
    args.out.write_text(svg(lines), encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
