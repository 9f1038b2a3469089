"""What a machine runs out of, space and memory: each time one sentence that says where and what to
do, an exit code, and nothing lost.

State and pending sets of one device lie in folders of their own, so a small file system is mounted
there for them alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.units import GIB, KIB, MIB
from tests.background import TRACEBACK, UNSHARED, Running, assert_clear
from tests.blockdev import Lab, run
from tests.faultfs import FaultFile
from tests.smallfs import PAGE, full, places, read_only, small_fs
from tests.test_events import SIZE, change, filled, identical, resize

pytestmark = pytest.mark.needs("root", "loop", "bpf")

HUGE = 64 * 1024 * GIB


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
    for pages in range(10):
        with full(pending, left=pages * PAGE):
            done = shared.blktrack("sync", device, replica)
        if done.code == 0:
            break
        assert_clear(done, 1, str(pending), "No space left", "free space")
        assert not replica.exists(), "nothing was begun"
        assert shared.status(device)["state"] == "tracking"
    assert done.out.startswith("initial: 64 MiB") and pages > 0, done
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
    # The next run finishes that, and has nothing more to ship.
    assert shared.sync(device, replica).mode == "nothing"
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
