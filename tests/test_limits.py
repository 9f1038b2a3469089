"""What a machine runs out of, and what it takes away: each time one sentence that says where and
what to do, an exit code, and nothing lost.

State and pending sets of one device lie in folders of their own, so a small file system is mounted
there for them alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blktrack.device import device_id
from blktrack.errors import NotTracked
from blktrack.sysfs import BlockDevice
from blktrack.units import GIB, KIB, MIB
from tests.background import TRACEBACK, UNSHARED, Running, assert_clear, past_start
from tests.blockdev import TOP, Done, Lab, run, wait_until
from tests.faultfs import FaultFile
from tests.test_events import SIZE, change, filled, identical, resize

pytestmark = pytest.mark.needs("root", "loop", "bpf")

PAGE = 4 * KIB
HUGE = 64 * 1024 * GIB


def small_fs(lab: Lab, point: Path, size: int = MIB) -> Path:
    """A tmpfs mounted there until the end of the test."""
    point.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", point)
    lab.stack.callback(run, "umount", point)
    return point


def places(lab: Lab, device: str) -> tuple[Path, Path]:
    """Where the state of a device is and where its pending sets are, each a small file system."""
    number = device_id(BlockDevice.find(device))
    return small_fs(lab, lab.store.lib(number)), small_fs(lab, lab.store.run(number))


@contextlib.contextmanager
def full(folder: Path, *, left: int = 0) -> Iterator[None]:
    """Fill a small file system up to so many bytes."""
    filler = folder / "filler"
    fd = os.open(filler, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(fd, bytes(PAGE))
        os.ftruncate(fd, os.fstat(fd).st_size - left)
        yield
    finally:
        os.close(fd)
        filler.unlink()


@contextlib.contextmanager
def read_only(point: Path) -> Iterator[None]:
    run("mount", "-o", "remount,ro", point)
    try:
        yield
    finally:
        run("mount", "-o", "remount,rw", point)


def scatter(device: str, number: int) -> None:
    """Changes in every page of the sets: with granules of 512 bytes each is of 16 MiB."""
    for start in range(0, 32 * MIB, 8 * MIB):
        change(device, start + number * 64 * KIB, 4 * KIB, number)


@pytest.mark.parametrize(
    ("kind", "granularity", "rooms"),
    [
        ("loop-512", 512, (0, 1, 2, 3, 4, 6, 9)),
        pytest.param("zram", 4 * KIB, (0, 1, 2, 4), marks=pytest.mark.needs("zram")),
    ],
)
def test_no_memory_for_the_pending_sets(
    shared: Lab, kind: str, granularity: int, rooms: tuple[int, ...]
) -> None:
    """Whatever store it is that finds no page, it is an error, never a SIGBUS."""
    device, replica = shared.device(kind, 32 * MIB)[0], shared.name("replica")
    _, pending = places(shared, device)
    assert shared.blktrack("track", device, "--granularity", str(granularity)).code == 0
    shared.sync(device, replica)
    codes = []
    for pages in rooms:
        scatter(device, pages + 1)
        with full(pending, left=pages * PAGE):
            done = shared.blktrack("sync", device, replica, "--no-resync", "--quiet")
        codes.append(done.code)
        if done.code:
            assert_clear(done, 1, str(pending), "No space left", "free space on that file system")
        again = shared.sync(device, replica)
        assert again.mode == ("incremental" if done.code else "nothing")
        assert identical(device, replica)
    assert codes == sorted(codes, reverse=True), "more room is never worse"
    assert codes[0] == 1
    assert codes[-1] == 0


def test_no_memory_to_begin_with(shared: Lab) -> None:
    """`track`, and the first sync of a replica, which has to ship everything."""
    device, replica = filled(shared, 64 * MIB), shared.name("replica")
    _, pending = places(shared, device)
    with full(pending):
        assert_clear(shared.blktrack("track", device), 1, str(pending), "No space left")
    assert shared.blktrack("track", device, "--granularity", "512", "--quiet").code == 0
    for pages in (0, 1, 3):
        with full(pending, left=pages * PAGE):
            done = shared.blktrack("sync", device, replica)
            assert_clear(done, 1, str(pending), "No space left", "free space")
            assert not replica.exists(), "nothing was begun"
            assert shared.status(device)["state"] == "tracking"
    assert shared.sync(device, replica).mode == "initial"
    assert identical(device, replica)


@pytest.mark.parametrize("how", [full, read_only])
def test_no_room_for_the_state(
    shared: Lab, how: Callable[[Path], contextlib.AbstractContextManager[None]]
) -> None:
    says = {full: "No space left on device", read_only: "Read-only file system"}[how]
    device, replica = filled(shared), shared.name("replica")
    state, _ = places(shared, device)
    with how(state):
        assert_clear(shared.blktrack("track", device), 1, f"cannot write {state}", says)
    shared.track(device)
    with how(state):
        assert_clear(shared.blktrack("sync", device, replica), 1, f"cannot write {state}", says)
    assert shared.sync(device, replica).mode == "initial"
    for number in (1, 2):
        change(device, MIB * number, number=number)
        with how(state):
            done = shared.blktrack("sync", device, replica)
            assert_clear(done, 1, f"cannot write {state}", says, "free space on that file system")
            assert shared.status(device)["state"] == "tracking"
        again = shared.sync(device, replica)
        # The replica was committed: only its link did not come to know.
        assert again.mode in ("incremental", "nothing")
        assert identical(device, replica)
    # A doubt that cannot be written down is found again.
    boot = {"BLKTRACK_BOOT_ID": "another"}
    with how(state):
        done = shared.blktrack("sync", device, replica, env=boot)
        assert_clear(done, 1, f"cannot write {state}", says)
    assert shared.blktrack("sync", device, replica, "--json", env=boot).json["mode"] == "resync"
    with how(state):
        done = shared.blktrack("stop", device, env=boot)
        assert done.code == 1
        assert says in done.err
        assert TRACEBACK not in done.err
    change(device, 2 * MIB)
    last = shared.blktrack("sync", device, replica, "--json", env=boot).json
    assert last["mode"] == "incremental"
    assert identical(device, replica)


def test_a_run_directory_that_is_read_only(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    _, pending = places(shared, device)
    shared.track(device)
    shared.sync(device, replica)
    change(device, MIB)
    with read_only(pending):
        for words in (["sync", device, str(replica)], ["status", device], ["track", device]):
            done = shared.blktrack(*words)
            assert_clear(done, 1, str(pending), "Read-only file system", "make it writable")
    assert shared.sync(device, replica).mode == "incremental"
    assert identical(device, replica)


def test_a_full_file_system_of_the_replica(shared: Lab) -> None:
    device = filled(shared)
    point = small_fs(shared, shared.name("mount"), SIZE // 2)
    replica = point / "replica"
    shared.track(device)
    done = shared.blktrack("sync", device, replica)
    assert_clear(done, 1, f"cannot write {replica} at ", "No space left on device", "free space")
    run("mount", "-o", f"remount,size={2 * SIZE}", point)
    rest = shared.sync(device, replica)
    assert rest.mode == "initial"
    assert 0 < rest.bytes_changed < SIZE, "it goes on where it stopped"
    assert identical(device, replica)
    # An increment needs room where the replica has a hole.
    run("blkdiscard", "-o", str(MIB), "-l", str(MIB), device)
    shared.sync(device, replica)
    change(device, MIB, MIB)
    with full(point):
        done = shared.blktrack("sync", device, replica)
        assert_clear(done, 1, f"no room in {replica}.blktrack", "free space", "--in-place")
    assert shared.sync(device, replica).mode == "incremental"
    assert identical(device, replica)


def test_no_room_for_the_record_of_a_replica(shared: Lab) -> None:
    device = filled(shared)
    point = small_fs(shared, shared.name("mount"))
    shared.track(device)
    with full(point):
        done = shared.blktrack("sync", device, point / "replica")
        assert_clear(done, 1, f"cannot write {point}/replica.blktrack", "free space")
    assert not (point / "replica").exists()


def test_a_limit_of_file_sizes(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    limited = ("prlimit", f"--fsize={SIZE // 2}")
    done = Running(shared, "sync", device, replica, prefix=limited).end()
    assert_clear(done, 1, f"cannot resize {replica}: File too large", "ulimit -f")
    assert not replica.exists()
    shared.sync(device, replica)
    change(device, MIB)
    change(device, SIZE - MIB)
    done = Running(shared, "sync", device, replica, prefix=limited).end()
    assert_clear(done, 1, f"cannot write {replica}", "ulimit -f")  # when it is applied
    assert shared.sync(device, replica).mode == "incremental"
    assert identical(device, replica)


@pytest.mark.needs("fuse")
def test_a_replica_that_cannot_be_written(shared: Lab) -> None:
    fault = shared.stack.enter_context(FaultFile(shared.folder, SIZE))
    device, replica = filled(shared), shared.loop(SIZE, file=fault.path)
    shared.track(device)
    shared.sync(device, replica)
    change(device, MIB)
    change(device, 3 * MIB)
    fault.fail(writes=[(3 * MIB + 4 * KIB, 4 * KIB)])
    done = shared.blktrack("sync", device, replica)
    assert_clear(done, 1, f"cannot write {replica} at {3 * MIB}+", "Input/output error", "medium")
    status = shared.status(device)["links"][0]
    assert status["pending_bytes"] >= 64 * KIB
    change(device, 5 * MIB)
    fault.fail()
    again = shared.sync(device, replica)
    assert (again.mode, again.consistency) == ("incremental", "crash")
    assert identical(device, replica)


@pytest.mark.needs("fuse")
def test_a_changed_place_of_the_source_that_cannot_be_read(shared: Lab) -> None:
    fault = shared.stack.enter_context(FaultFile(shared.folder, SIZE))
    device, replica = shared.loop(SIZE, file=fault.path), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    change(device, MIB)
    change(device, 3 * MIB)
    fault.fail(reads=[(3 * MIB + 4 * KIB, 4 * KIB)])
    done = shared.blktrack("sync", device, replica)
    assert_clear(
        done, 1, f"{device} could not be read at {3 * MIB + 4 * KIB}+{4 * KIB}", "check the disk"
    )
    assert shared.status(device)["links"][0]["pending_bytes"] == 128 * KIB, "all of it"
    verified = shared.blktrack("verify", device, replica)
    assert_clear(verified, 1, f"{device} could not be read at {3 * MIB + 4 * KIB}")
    fault.fail()
    again = shared.sync(device, replica)
    assert (again.mode, again.bytes_changed) == ("incremental", 128 * KIB)
    assert identical(device, replica)


def test_more_maps_than_memory(shared: Lab) -> None:
    device = shared.loop(HUGE)
    done = shared.blktrack("track", device, "--granularity", "512")
    assert_clear(
        done, 1, f"tracking {device} needs 65 GiB", "are available", "larger --granularity"
    )
    assert shared.blktrack("track", device, "--quiet").code == 0
    assert shared.status(device)["state"] == "tracking"


def test_memory_that_is_nearly_gone(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    meminfo = shared.name("meminfo")
    meminfo.write_text("MemTotal: 64 kB\nMemAvailable: 16 kB\n", encoding="ascii")
    short = (*UNSHARED, "sh", "-c", f'mount --bind {meminfo} /proc/meminfo; exec "$@"', "sh")
    done = Running(shared, "track", device, prefix=short).end()
    assert_clear(done, 1, f"tracking {device} needs", "16 KiB are available", "--granularity")
    shared.track(device)
    # What is tracked already goes on.
    assert Running(shared, "sync", device, replica, "--quiet", prefix=short).end().code == 0
    assert identical(device, replica)


def test_no_memory_for_a_list(shared: Lab) -> None:
    """What a command needs itself, past the kernel's maps."""
    device = shared.loop(64 * GIB)
    shared.track(device, 512)
    change(device, MIB)
    # The peak is its copy of a plane, 16 MiB.
    measure = "\n".join(
        (
            "import sys; from blktrack.cli import main; main(sys.argv[1:])",
            "lines = open('/proc/self/status').read().split('\\n')",
            "print(next(line.split()[1] for line in lines if line.startswith('VmPeak')))",
        )
    )
    peak = int(run(sys.executable, "-c", measure, "extents", device).split("\n")[-1]) * KIB
    limited = ("prlimit", f"--as={peak - 8 * MIB}")
    done = Running(shared, "extents", device, prefix=limited).end()
    assert_clear(done, 1, "blktrack: out of memory", "free some")
    assert shared.blktrack("extents", device).out == f"{MIB} {64 * KIB}\n"


def test_growth_beyond_memory(shared: Lab) -> None:
    """The device is tracked up to its old size as before, should it go back to it."""
    device, replica = filled(shared), shared.name("replica")
    shared.track(device, 512)
    shared.sync(device, replica)
    change(device, MIB)
    resize(device, HUGE)
    for words in (["sync", device, str(replica)], ["status", device], ["extents", device]):
        done = shared.blktrack(*words)
        assert_clear(done, 1, f"tracking {device} needs 65 GiB", "are available", "untrack")
    resize(device, SIZE)
    assert shared.sync(device, replica).mode == "incremental"
    assert identical(device, replica)


def test_other_commands_while_a_sync_runs(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, "--limit", "2M", "--json")
    running.until_open(device, replica)
    commands = ("stop", "track", "status", "extents", "start")
    others = {command: Running(shared, command, device) for command in commands}
    for command, other in others.items():
        done = other.end()
        assert done.code == (6 if command == "stop" else 0), done
        if command == "stop":
            assert f"{device}: in use, it is open in" in done.err
    assert running.process.poll() is None, "all of it was while the sync ran"
    change(device, MIB)
    assert running.end().json["mode"] == "initial"
    change(device, 2 * MIB)
    assert shared.sync(device, replica).mode == "incremental"
    assert identical(device, replica)


def test_untrack_while_a_sync_runs(shared: Lab) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    running = Running(shared, "sync", device, replica, "--limit", "4M", "--json")
    running.until_open(device, replica)
    shared.untrack(device)
    change(device, MIB)
    assert_clear(running.end(), 3, f"{device} is no longer tracked")
    assert_clear(shared.blktrack("sync", device, replica), 3, f"blktrack track {device}")
    shared.track(device)
    assert shared.sync(device, replica).mode == "initial"
    assert identical(device, replica)


def test_a_signal_at_any_time(shared: Lab, seed: int) -> None:
    rng = random.Random(seed)
    device, replica, other = filled(shared), shared.name("replica"), shared.loop(SIZE)
    shared.track(device)
    shared.sync(device, replica)
    commands = {
        "track": ["track", other],
        "status": ["status"],
        "extents": ["extents", device],
        "stop": ["stop", device],
        "start": ["start", device],
        "sync": ["sync", device, str(replica)],
        "verify": ["verify", device, str(replica)],
    }
    lasts = {}
    for name, words in commands.items():
        begun = time.monotonic()
        assert shared.blktrack(*words).code == 0, name
        lasts[name] = time.monotonic() - begun
    signals = itertools.cycle((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    ended = {"by the signal": 0, "before it": 0}
    for turn in range(24):
        name = list(commands)[turn % len(commands)]
        if name == "track":
            with contextlib.suppress(NotTracked):
                shared.untrack(other)
        if shared.status(device)["state"] == "tracking":  # not at rest, where it would be a doubt
            change(device, turn % 64 * 128 * KIB, number=turn + 2)
        running = Running(shared, *commands[name])
        wait_until(past_start(running.process), "the start")
        # A wait of no fixed length is the point here: whatever it is doing by then.
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(timeout=rng.uniform(0, lasts[name]))
        number = next(signals)
        running.process.send_signal(number)
        done = running.end()
        assert done.err == "" or done.err.startswith("blktrack: "), (name, number, done)
        # verify finds what was changed just now
        fine = (0, 128 + number, -number, *((5,) if name == "verify" else ()))
        assert done.code in fine, (name, number, done)
        ended["by the signal" if done.code in (128 + number, -number) else "before it"] += 1
    assert ended["by the signal"] > 5, ended
    shared.track(other)
    assert shared.status(other)["state"] == "tracking"
    last = shared.blktrack("sync", device, replica, "--json", "--no-resync").json
    assert last["mode"] in ("incremental", "nothing")
    assert identical(device, replica)


def test_signals_that_are_ignored_stay_so(shared: Lab) -> None:
    """As by nohup, and by a shell for what runs in its background."""
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    deaf = ("env", "--ignore-signal=HUP", "--ignore-signal=INT")
    running = Running(shared, "sync", device, replica, "--limit", "4M", "--quiet", prefix=deaf)
    running.until_open(device, replica)
    running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == Done(0, "", "")
    assert identical(device, replica)


@pytest.mark.parametrize("command", ["status", "extents", "sync", "--help"])
def test_nobody_reads_the_output(shared: Lab, command: str) -> None:
    device, replica = filled(shared), shared.name("replica")
    shared.track(device)
    change(device, MIB)
    words = {
        "status": ["status"],
        "extents": ["extents", device],
        "sync": ["sync", device, str(replica)],
        "--help": ["--help"],
    }[command]
    with open("/dev/full", "w", encoding="ascii") as nowhere:
        reader, closed = os.pipe()
        os.close(reader)
        for output, code, says in ((closed, 141, ""), (nowhere.fileno(), 1, "No space left")):
            done = subprocess.run(
                [sys.executable, "-m", "blktrack", *words],
                stdout=output, stderr=subprocess.PIPE, text=True, check=False, cwd=TOP,
            )  # fmt: skip
            assert done.returncode == code, done
            assert says in done.stderr
            assert TRACEBACK not in done.stderr
            assert "Exception" not in done.stderr
        os.close(closed)
    if command == "sync":
        assert shared.sync(device, replica).mode == "nothing"
        assert identical(device, replica)
