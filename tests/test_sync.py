"""`sync` and `verify` as an operator meets them: modes, interruptions, failures, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blktrack.units import KIB, MIB
from tests import sectors
from tests.blockdev import TOP, Lab, read_image, wait_until, write_direct
from tests.faultfs import FaultFile
from tests.oracle import fill, repeating

on_loop = pytest.mark.needs("root", "loop", "bpf")

SYNC_KEYS = {
    "mode",
    "reason",
    "consistency",
    "epoch",
    "point",
    "rounds",
    "extents",
    "bytes_changed",
    "bytes_shipped",
    "bytes_wire",
    "freeze_s",
    "duration_s",
}


def change(device: str, offset: int, length: int = 64 * KIB, number: int = 1) -> None:
    write_direct(device, offset, sectors.make(offset, length, number))


def identical(device: str, replica: str | Path) -> bool:
    return not sectors.faults(read_image(device), read_image(replica))


def start(lab: Lab, *words: str | Path) -> subprocess.Popen[str]:
    """A command in the background, in a process group of its own as a shell would have it."""
    command = [sys.executable, "-m", "blktrack", *(str(word) for word in words)]
    return subprocess.Popen(
        command,
        cwd=TOP,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@on_loop
def test_initial_then_nothing_then_incremental(lab: Lab) -> None:
    device, replica = lab.loop(16 * MIB), lab.name("replica")
    fill(device)
    done = lab.blktrack("sync", device, replica, "--json")
    assert (done.code, done.out) == (3, "")
    assert f"blktrack track {device}" in done.err
    lab.track(device)
    first = lab.blktrack("sync", device, replica, "--json").json
    assert set(first) >= SYNC_KEYS
    assert (first["mode"], first["bytes_changed"]) == ("initial", 16 * MIB)
    second = lab.blktrack("sync", device, replica, "--json").json
    assert (second["mode"], second["bytes_shipped"], second["rounds"]) == ("nothing", 0, 0)
    change(device, MIB)
    third = lab.blktrack("sync", device, replica, "--json").json
    assert (third["mode"], third["extents"], third["bytes_shipped"]) == ("incremental", 1, 64 * KIB)
    assert third["epoch"] > second["epoch"] > first["epoch"]
    assert third["consistency"] == "crash"
    assert identical(device, replica)


@on_loop
def test_a_point_under_writes_claims_nothing(lab: Lab) -> None:
    device, replica = lab.loop(64 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    with repeating(lambda: change(device, 32 * MIB, 4 * KIB)):
        words = ("sync", device, replica, "--consistency", "none", "--json")
        first = lab.blktrack(*words).json
    assert first["consistency"] == "none"
    last = lab.blktrack("sync", device, replica, "--json").json
    assert last["consistency"] == "crash"
    assert identical(device, replica)


@on_loop
def test_replicas_of_one_device_have_their_own_pending_sets(lab: Lab) -> None:
    device, one, other = lab.loop(16 * MIB), lab.name("one"), lab.loop(16 * MIB)
    fill(device)
    lab.track(device)
    for replica in (one, other):
        assert lab.blktrack("sync", device, replica, "--json").json["mode"] == "initial"
    change(device, MIB)
    assert lab.blktrack("sync", device, one, "--json").json["bytes_shipped"] == 64 * KIB
    change(device, 2 * MIB)
    pending = {
        link["target"]: link["pending_bytes"]
        for link in lab.blktrack("status", device, "--json").json["devices"][0]["links"]
    }
    assert pending == {str(one): 64 * KIB, other: 128 * KIB}
    assert lab.blktrack("sync", device, other, "--json").json["bytes_shipped"] == 128 * KIB
    assert lab.blktrack("sync", device, one, "--json").json["bytes_shipped"] == 64 * KIB
    assert identical(device, one)
    assert identical(device, other)


@pytest.mark.needs("root", "loop", "bpf")
def test_two_partitions_of_a_disk_each_have_a_replica(lab: Lab) -> None:
    disk = lab.loop(32 * MIB)
    parts = [lab.partition(disk, 1, MIB, 8 * MIB), lab.partition(disk, 2, 9 * MIB, 8 * MIB)]
    replicas = [lab.name("replica"), lab.name("replica")]
    for part, replica in zip(parts, replicas, strict=True):
        fill(part)
        lab.track(part)
        assert lab.blktrack("sync", part, replica, "--json").json["mode"] == "initial"
    # Through the whole disk, over the border of the two.
    change(disk, 9 * MIB - 8 * KIB, 12 * KIB)
    shipped = [
        lab.blktrack("sync", part, replica, "--json").json["bytes_shipped"]
        for part, replica in zip(parts, replicas, strict=True)
    ]
    assert shipped == [8 * KIB, 4 * KIB]
    for part, replica in zip(parts, replicas, strict=True):
        assert identical(part, replica)


@on_loop
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_initial_copy_goes_on_where_it_stopped(
    lab: Lab, number: signal.Signals
) -> None:
    device, replica = lab.loop(64 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    running = start(lab, "sync", device, replica, "--limit", "4M")
    wait_until(lambda: replica.exists() and replica.stat().st_blocks * 512 > 6 * MIB, "some copy")
    change(device, 0)  # of what has been copied
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (128 + number, "")
    assert "interrupted" in err
    assert "Traceback" not in err
    status = lab.blktrack("status", device, "--json").json["devices"][0]["links"][0]
    assert status["state"] == "initial"
    rest = lab.blktrack("sync", device, replica, "--json").json
    assert rest["mode"] == "initial"
    assert 0 < rest["bytes_changed"] < 60 * MIB
    assert identical(device, replica)


@on_loop
@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_replica_that_others_wrote_to_before_it_had_a_point(lab: Lab, kind: str) -> None:
    """What had been copied is not what is there: it is copied anew."""
    device = lab.loop(64 * MIB)
    replica = lab.loop(64 * MIB) if kind == "device" else str(lab.name("replica"))
    fill(device)
    lab.track(device)
    running = start(lab, "sync", device, replica, "--limit", "8M")
    wait_until(lambda: lab.status(device)["links"] != [], "a link")
    wait_until(lambda: Path(replica).exists() and bool(read_image(replica)[:MIB].any()), "a copy")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    write_direct(replica, 256 * KIB, b"rude" * 1024)
    lab.sync(device, replica)
    assert identical(device, replica)


@on_loop
def test_a_killed_initial_copy_ends_identical(lab: Lab) -> None:
    device, replica = lab.loop(32 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    running = start(lab, "sync", device, replica, "--limit", "4M")
    wait_until(lambda: replica.exists() and replica.stat().st_blocks * 512 > 4 * MIB, "some copy")
    running.kill()
    running.communicate(timeout=60)
    change(device, 0)
    assert lab.blktrack("sync", device, replica, "--json").json["mode"] == "initial"
    assert identical(device, replica)


@on_loop
def test_a_replica_made_anew_in_the_middle_is_copied_from_the_start(lab: Lab) -> None:
    device, replica = lab.loop(32 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    running = start(lab, "sync", device, replica, "--limit", "8M")
    wait_until(lambda: replica.exists() and replica.stat().st_blocks * 512 > 4 * MIB, "some copy")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    replica.unlink()
    shutil.rmtree(f"{replica}.blktrack")
    again = lab.blktrack("sync", device, replica, "--json").json
    assert (again["mode"], again["bytes_changed"]) == ("initial", 32 * MIB)
    assert identical(device, replica)


@on_loop
def test_a_second_run_is_told_that_it_is_busy(lab: Lab) -> None:
    device, replica = lab.loop(32 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    running = start(lab, "sync", device, replica, "--limit", "4M")
    try:
        wait_until(lambda: Path(f"{replica}.blktrack/replica.json").exists(), "the first run")
        for command in ("sync", "verify"):
            second = lab.blktrack(command, device, replica)
            assert second.code == 6, second.err
            assert str(replica) in second.err
        # Another replica of the same device is not held up.
        assert lab.blktrack("sync", device, lab.name("other"), "--json").json["mode"] == "initial"
    finally:
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)


@pytest.mark.needs("root", "loop", "bpf", "fuse")
def test_what_cannot_be_read_is_named_and_stays_pending(lab: Lab) -> None:
    with FaultFile(lab.folder, 16 * MIB) as fault:
        device = lab.loop(16 * MIB, file=fault.path)
        try:
            replica = lab.name("replica")
            fill(device)
            lab.track(device)
            fault.fail(reads=[(4 * MIB, 8 * KIB)])
            done = lab.blktrack("sync", device, replica)
            assert done.code == 1
            assert f"{4 * MIB}+{8 * KIB}" in done.err
            assert "Traceback" not in done.err
            link = lab.blktrack("status", device, "--json").json["devices"][0]["links"][0]
            assert (link["state"], link["pending_bytes"]) == ("initial", 8 * KIB)
            fault.fail(reads=[])
            again = lab.blktrack("sync", device, replica, "--json").json
            assert (again["mode"], again["bytes_changed"]) == ("initial", 8 * KIB)
            assert identical(device, replica)
        finally:
            lab.untrack(device)
            subprocess.run(["losetup", "--detach", device], check=True)


@on_loop
def test_verify_finds_and_repairs(lab: Lab) -> None:
    device, replica = lab.loop(16 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    lab.blktrack("sync", device, replica)
    assert lab.blktrack("verify", device, replica).code == 0
    with replica.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"x" * 100)
        file.flush()
        os.fsync(file.fileno())
    done = lab.blktrack("verify", device, replica, "--json")
    assert done.code == 5
    assert set(done.json) >= {"bytes_compared", "bytes_different", "extents"}
    assert done.json["extents"] == [[5 * MIB, 4 * KIB]]
    # The next sync notices by itself that somebody else wrote to the replica.
    refused = lab.blktrack("sync", device, replica, "--no-resync")
    assert refused.code == 3
    assert "written to by something else" in refused.err
    repaired = lab.blktrack("verify", device, replica, "--repair", "--json")
    assert (repaired.code, repaired.json["bytes_repaired"]) == (0, 4 * KIB)
    assert lab.blktrack("verify", device, replica).code == 0
    assert lab.blktrack("sync", device, replica, "--json").json["mode"] == "nothing"


@on_loop
def test_a_replica_that_went_back_is_resynced(lab: Lab) -> None:
    device, replica, old = lab.loop(16 * MIB), lab.name("replica"), lab.name("old")
    fill(device)
    lab.track(device)
    lab.blktrack("sync", device, replica)
    shutil.copytree(f"{replica}.blktrack", f"{old}.blktrack")
    shutil.copy2(replica, old)
    change(device, MIB)
    lab.blktrack("sync", device, replica)
    shutil.copytree(f"{old}.blktrack", f"{replica}.blktrack", dirs_exist_ok=True)
    replica.write_bytes(old.read_bytes())
    back = lab.blktrack("sync", device, replica, "--json").json
    assert back["mode"] == "resync"
    assert back["bytes_shipped"] == 64 * KIB
    assert identical(device, replica)


@on_loop
def test_zeroes_become_holes(lab: Lab) -> None:
    device, replica = lab.loop(64 * MIB), lab.name("replica")
    change(device, 8 * MIB, MIB)
    lab.track(device)
    first = lab.blktrack("sync", device, replica, "--json").json
    assert (first["bytes_shipped"], first["bytes_zeroed"]) == (MIB, 63 * MIB)
    assert replica.stat().st_blocks * 512 <= 2 * MIB
    subprocess.run(["blkdiscard", "-o", str(8 * MIB), "-l", str(MIB), device], check=True)
    lab.blktrack("sync", device, replica)
    assert replica.stat().st_blocks == 0
    assert identical(device, replica)


@on_loop
def test_output_without_a_terminal(lab: Lab) -> None:
    device, replica = lab.loop(16 * MIB), lab.name("replica")
    lab.track(device)
    loud = lab.blktrack("sync", device, replica, "--limit", "8M")
    assert loud.code == 0
    assert "\x1b" not in loud.out + loud.err
    quiet = lab.blktrack("sync", device, replica, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert lab.blktrack("sync", device, "/nowhere/replica", "--quiet").err


@on_loop
def test_wrong_usage_is_one_sentence_and_a_code(lab: Lab) -> None:
    device, other, replica = lab.loop(16 * MIB), lab.loop(8 * MIB), lab.name("replica")
    lab.track(device)
    cases: list[tuple[int, list[str]]] = [
        (2, ["sync", device]),
        (2, ["sync", device, str(replica), "--limit", "fast"]),
        (2, ["sync", "/dev/null", str(replica)]),
        (2, ["sync", "/nowhere", str(replica)]),
        (2, ["track", device, "--granularity", "5000"]),
        (2, ["track", str(TOP)]),
        (2, ["nonsense"]),
        (2, ["sync", device, "ssh://host"]),
        (2, ["extents", device, "--target", "nothing"]),
        (3, ["extents", other]),
        (3, ["untrack", other]),
        (3, ["status", other]),
        (1, ["sync", device, device]),
        (1, ["sync", device, other]),
        (1, ["verify", device, "/nowhere/replica"]),
    ]
    for code, words in cases:
        done = lab.blktrack(*words)
        assert done.code == code, (words, done)
        assert done.err, words
        assert "Traceback" not in done.err, (words, done.err)
        assert done.out == "", words


@on_loop
def test_without_root_there_is_one_sentence(lab: Lab) -> None:
    command = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-m", "blktrack"]
    done = subprocess.run(
        [*command, "status"], capture_output=True, text=True, check=False, cwd=TOP
    )
    assert done.returncode == 1
    assert "needs root" in done.stderr


@on_loop
def test_a_resync_ships_only_what_differs(lab: Lab) -> None:
    device, replica = lab.loop(32 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    lab.blktrack("sync", device, replica)
    change(device, MIB)
    boot = {"BLKTRACK_BOOT_ID": "another"}
    refused = lab.blktrack("sync", device, replica, "--no-resync", env=boot)
    assert refused.code == 3
    assert "rebooted" in refused.err
    done = lab.blktrack("sync", device, replica, "--json", env=boot).json
    assert (done["mode"], done["reason"]) == (
        "resync",
        "the host was rebooted without blktrack stop",
    )
    assert done["bytes_shipped"] == 64 * KIB
    assert lab.blktrack("sync", device, replica, "--json", env=boot).json["mode"] == "nothing"
    assert identical(device, replica)


@on_loop
def test_a_full_copy_on_request(lab: Lab) -> None:
    device, replica = lab.loop(16 * MIB), lab.name("replica")
    fill(device)
    lab.track(device)
    lab.blktrack("sync", device, replica)
    again = lab.blktrack("sync", device, replica, "--full", "--json").json
    assert (again["mode"], again["bytes_shipped"]) == ("initial", 16 * MIB)
    assert lab.blktrack("sync", device, replica, "--json").json["mode"] == "nothing"


@on_loop
def test_json_is_one_object(lab: Lab) -> None:
    device = lab.loop(16 * MIB)
    lab.track(device)
    for command in (["status"], ["extents", device], ["track", device]):
        done = lab.blktrack(*command, "--json")
        assert done.code == 0
        assert done.out.count("\n") == 1
        assert isinstance(json.loads(done.out), dict)


@on_loop
def test_syncs_of_two_links_at_once_lose_nothing(lab: Lab) -> None:
    device, replicas = lab.loop(32 * MIB), [lab.name("replica"), lab.name("replica")]
    fill(device)
    lab.track(device)
    end = threading.Event()
    problems: list[str] = []

    def keep_syncing(replica: Path) -> None:
        while not end.is_set():
            done = lab.blktrack("sync", device, replica, "--quiet")
            if done.code:
                problems.append(done.err)

    threads = [threading.Thread(target=keep_syncing, args=(replica,)) for replica in replicas]
    for thread in threads:
        thread.start()
    for number in range(1, 400):
        change(device, (number * 37 % 512) * 64 * KIB, 4 * KIB, number)
    end.set()
    for thread in threads:
        thread.join()
    assert problems == []
    for replica in replicas:
        last = lab.blktrack("sync", device, replica, "--json").json
        assert last["mode"] in ("incremental", "nothing")
        assert identical(device, replica)
