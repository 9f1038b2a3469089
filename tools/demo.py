"""The main job, on a real disk: a live ext4 replicated while files and a database change.

Makes a loop disk in a folder of its own, tracks and syncs it under load, then proves the replica:
digest, fsck, SQLite's integrity check. Every figure printed is measured in this run. Cleans up
after itself, interrupted or not. Needs root and about 3.5 GiB in /var/tmp, or in --dir.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blktrack.units import MIB, format_duration, format_rate, format_size

DISK = 1024 * MIB
FILES, FILE_SIZE = 48, 8 * MIB
PATIENCE = 30.0  # seconds for a file system to be gone after umount
console = Console(highlight=False)


class Failed(Exception):
    """A step of the demonstration did not do what it has to."""


def run(*command: str, ok: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in ok:
        raise Failed(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def blktrack(*words: str) -> dict[str, Any]:
    """A command of the product, as its user would type it; its JSON."""
    console.print(f"[bold]# blktrack {' '.join(words)}[/]", soft_wrap=True)
    out: dict[str, Any] = json.loads(run(sys.executable, "-m", "blktrack", *words, "--json"))
    return out


class Workload:
    """A thread that rewrites parts of files and commits rows to a database until it is stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._random = random.Random(1)
        self.rows = 0
        self.error: Exception | None = None

    def prepare(self) -> None:
        for number in range(FILES):
            (self._folder / f"file{number}").write_bytes(self._random.randbytes(FILE_SIZE))
        with contextlib.closing(sqlite3.connect(self._folder / "orders.db")) as database:
            database.execute("pragma journal_mode=wal")
            database.execute("create table orders (id integer primary key, note text, sum text)")
            database.commit()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with contextlib.closing(sqlite3.connect(self._folder / "orders.db")) as database:
                while not self._stop.is_set():
                    self._rewrite_some()
                    self._insert(database)
        except Exception as error:
            self.error = error

    def _rewrite_some(self) -> None:
        with open(self._folder / f"file{self._random.randrange(FILES)}", "r+b") as file:
            file.seek(self._random.randrange(FILE_SIZE - 65536))
            file.write(self._random.randbytes(65536))
            file.flush()
            os.fsync(file.fileno())

    def _insert(self, database: sqlite3.Connection) -> None:
        for _ in range(20):
            note = self._random.randbytes(50).hex()
            digest = hashlib.sha256(note.encode()).hexdigest()
            database.execute("insert into orders (note, sum) values (?, ?)", (note, digest))
            self.rows += 1
        database.commit()


def sha256(path: str) -> str:
    return run("sha256sum", path).split()[0]


def check_database(path: Path, rows: int) -> str:
    """Integrity, the number of rows, and that each row is whole. Read-only, so without a WAL."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as database:
        verdict = str(database.execute("pragma integrity_check").fetchone()[0])
        found = database.execute("select note, sum from orders").fetchall()
    if len(found) != rows:
        raise Failed(f"the replica's database has {len(found)} rows, {rows} were committed")
    if any(hashlib.sha256(note.encode()).hexdigest() != digest for note, digest in found):
        raise Failed("a row of the replica's database is damaged")
    return verdict


def settle(seconds: float, work: Workload) -> None:
    """Let the workload run on for a while; an error of its own ends the demonstration."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if work.error:
            raise Failed(f"the workload failed: {work.error}")
        time.sleep(0.05)


def wait_until_unused(disk: str) -> None:
    """A mount namespace made meanwhile keeps a file system; its last writes come with its end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise Failed(f"{disk} is still in use: {error.strerror}") from error
        time.sleep(0.05)


def full_copy(disk: str, folder: Path) -> float:
    """Seconds that a plain copy of everything takes, for comparison."""
    copy = folder / "full-copy.img"
    begun = time.monotonic()
    run("dd", f"if={disk}", f"of={copy}", "bs=4M", "iflag=direct", "conv=fsync", "status=none")
    seconds = time.monotonic() - begun
    copy.unlink()
    return seconds


def show(syncs: list[tuple[str, dict[str, Any]]], full: float) -> None:
    table = Table(title="Measured in this run", title_justify="left")
    table.add_column("what")
    for heading in ("changed", "shipped", "time", "rate", "consistency"):
        table.add_column(heading, justify="right")
    table.add_row(
        "full copy with dd",
        "",
        format_size(DISK),
        format_duration(full),
        format_rate(DISK, full),
        "none",
    )
    for name, sync in syncs:
        table.add_row(
            f"sync {name}",
            format_size(sync["bytes_changed"]),
            format_size(sync["bytes_shipped"]),
            format_duration(sync["duration_s"]),
            format_rate(sync["bytes_changed"], sync["duration_s"]),
            sync["consistency"],
        )
    console.print(table)


def demonstrate(folder: Path, cleanup: contextlib.ExitStack) -> None:
    image, replica = folder / "disk.img", folder / "replica.img"
    mount, restored = folder / "mount", folder / "restored"
    with open(image, "wb") as file:
        file.truncate(DISK)
    disk = run("losetup", "--find", "--show", str(image)).strip()
    cleanup.callback(run, "losetup", "--detach", disk, ok=(0, 1))
    run("mkfs.ext4", "-q", disk)
    mount.mkdir()
    run("mount", disk, str(mount))
    cleanup.callback(run, "umount", "--lazy", str(mount), ok=(0, 1, 32))
    console.print(f"{disk}: {format_size(DISK)}, ext4, mounted; filling it")
    work = Workload(mount)
    cleanup.callback(work.stop)
    work.prepare()
    run("sync", "-f", str(mount))

    tracked = blktrack("track", disk)
    cleanup.callback(run, sys.executable, "-m", "blktrack", "untrack", disk, ok=(0, 1, 2, 3))
    console.print(
        f"  granules of {format_size(tracked['granularity'])}, "
        f"{format_size(tracked['kernel_bytes'])} of kernel memory\n"
        "now files are rewritten and rows are committed to a database, all the time"
    )
    work.start()
    syncs = [("1: initial, busy", blktrack("sync", disk, str(replica)))]
    settle(2.0, work)
    syncs.append(("2: incremental, busy", blktrack("sync", disk, str(replica))))
    settle(2.0, work)
    work.stop()
    settle(0, work)
    run("umount", str(mount))
    wait_until_unused(disk)
    console.print(f"workload stopped after {work.rows} rows; file system unmounted")
    syncs.append(("3: incremental, quiet", blktrack("sync", disk, str(replica))))
    syncs.append(("4: nothing changed", blktrack("sync", disk, str(replica))))
    full = full_copy(disk, folder)
    prove(disk, replica, restored, work.rows, cleanup)
    show(syncs, full)


def prove(
    disk: str, replica: Path, restored: Path, rows: int, cleanup: contextlib.ExitStack
) -> None:
    verified = blktrack("verify", disk, str(replica))
    ours, theirs = sha256(disk), sha256(str(replica))
    if verified["bytes_different"] or ours != theirs:
        raise Failed("the replica differs from the disk")
    console.print(
        f"  {format_size(verified['bytes_compared'])} identical, sha256 {ours[:16]}… both"
    )
    run("fsck.ext4", "-f", "-n", str(replica))
    console.print("fsck.ext4 -n of the replica: clean")
    restored.mkdir()
    run("mount", "-o", "ro,loop", str(replica), str(restored))
    cleanup.callback(run, "umount", "--lazy", str(restored), ok=(0, 1, 32))
    verdict = check_database(restored / "orders.db", rows)
    console.print(f"SQLite integrity_check on the replica: {verdict}, all {rows} rows intact")
    if verdict != "ok":
        raise Failed("the replica's database is damaged")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", default="/var/tmp", help="where to work (default: %(default)s)")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("the demonstration makes and mounts a loop disk: run it as root", file=sys.stderr)
        return 1
    if shutil.disk_usage(args.dir).free < 3.5 * DISK:
        print(
            f"{args.dir} has less than {format_size(3.5 * DISK)} free: use --dir", file=sys.stderr
        )
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    with contextlib.ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix="blktrack-demo-", dir=args.dir))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ["BLKTRACK_ROOT"] = str(folder / "state")
        try:
            demonstrate(folder, cleanup)
        except Failed as failure:
            print(f"demo failed: {failure}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; cleaned up", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
