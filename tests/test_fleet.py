"""`sync --all` as an operator or a schedule meets it: many replicas, some of which fail."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blktrack.units import KIB
from tests.background import TRACEBACK, Running, assert_clear
from tests.blockdev import TOP, Done, Lab, run, wait_until
from tests.fleets import Fleet, children, is_alive

pytestmark = pytest.mark.needs("root", "loop", "bpf")

SLOW = '"512K"'  # eight seconds for a device that is full


@pytest.fixture
def fleet(shared: Lab) -> Fleet:
    return Fleet(shared)


def links(done: Done) -> dict[str, dict[str, Any]]:
    """By name."""
    return {link["name"]: link for link in json.loads(done.out)["links"]}


def exits(done: Done) -> dict[str, int]:
    return {name: link["exit"] for name, link in links(done).items()}


def process_of(fleet: Fleet, running: Running, name: str) -> int:
    """The process that syncs the first replica of a device, once it has that open."""
    target = str(next(iter(fleet.disks[name].replicas.values())))
    found: list[int] = []

    def look() -> bool:
        assert running.process.poll() is None, running.end()
        for pid in children(running.process.pid):
            try:
                opened = {os.readlink(each.path) for each in os.scandir(f"/proc/{pid}/fd")}
            except OSError:
                continue
            if target in opened:
                found.append(pid)
        return bool(found)

    wait_until(look, f"the sync of {name}")
    return found[0]


def break_by_hand(target: Path) -> None:
    """What lies there now is no replica, and not for blktrack to overwrite."""
    target.unlink()
    run("rm", "-r", f"{target}.blktrack")
    target.write_bytes(b"precious" * 1000)


def test_ten_devices_of_which_one_fails_and_one_is_away(fleet: Fleet) -> None:
    for number in range(9):
        fleet.add(f"disk{number}", ("near", "far") if number in (2, 5) else ("near",))
    fleet.add("gone", path="/dev/disk/by-id/blktrack-test-is-away")
    fleet.defaults = {"rpo": '"5m"', "jobs": "3"}
    fleet.write()
    first = fleet.sync("--json")
    assert first.code == 1
    assert exits(first) == {
        **{f"disk{n}.near": 0 for n in range(9)},
        "disk2.far": 0,
        "disk5.far": 0,
        "gone.near": 1,
    }
    assert list(exits(first))[2:5] == ["disk2.near", "disk2.far", "disk3.near"], "not of the file"

    break_by_hand(fleet.disks["disk3"].replicas["near"])
    fleet.change(1)
    done = fleet.sync("--json")
    assert done.code == json.loads(done.out)["exit"] == 1
    assert (done.err, TRACEBACK in done.err) == ("", False)
    found = links(done)
    failed = {name for name, link in found.items() if link["exit"]}
    assert failed == {"disk3.near", "gone.near"}
    broken = found["disk3.near"]
    assert broken["error"] and broken["hint"] and broken["report"] is None
    assert broken["point"] is not None and broken["lateness"] == "ok", "it was good once"
    assert "away" in found["gone.near"]["error"]
    assert (found["gone.near"]["point"], found["gone.near"]["lateness"]) == (None, "broken")
    for name, link in found.items():
        if name not in failed:
            device, _, replica = name.partition(".")
            assert link["report"]["mode"] == "incremental"
            assert link["report"]["bytes_shipped"] == 64 * KIB
            assert fleet.in_step(device, replica), name
            words = ("verify", link["device"], link["target"], "--json")
            assert fleet.lab.blktrack(*words).json["bytes_different"] == 0
    assert fleet.disks["disk3"].replicas["near"].read_bytes() == b"precious" * 1000


def test_what_is_told_of_a_round(fleet: Fleet) -> None:
    for number in range(4):
        fleet.add(f"disk{number}")
    fleet.defaults = {"rpo": '"5m"'}
    fleet.write()
    done = fleet.sync()
    assert (done.code, done.err) == (0, "")
    *lines, last = done.out.splitlines()
    assert last.startswith("4 replicas: 4 synced, ")
    target = fleet.disks["disk0"].replicas["near"]
    assert lines[0].startswith(f"disk0.near -> {target}: initial, 4 MiB shipped, ")
    assert lines[0].endswith("(crash)") and len(lines) == 4

    assert fleet.sync("--quiet") == Done(0, "", "")
    break_by_hand(fleet.disks["disk1"].replicas["near"])
    done = fleet.sync()
    assert done.code == 1
    assert "4 replicas: 3 synced, 1 failed, " in done.out and "disk1" not in done.out
    sentence, hint = done.err.splitlines()
    assert sentence.startswith(f"disk1.near -> {fleet.disks['disk1'].replicas['near']}: ")
    assert hint.startswith("  -> ")

    done = fleet.sync("--quiet")
    assert (done.code, done.out) == (1, "")
    head, what, hint, since, well = done.err.splitlines()
    assert head.startswith("blktrack: 1 of 4 replicas on ")
    assert what.startswith("disk1.near: ") and hint.startswith("  -> ")
    assert f"{fleet.disks['disk1'].path} -> " in since and "last point 20" in since
    assert "the promise of 5m holds so far" in since
    assert well == "Well: disk0.near, disk2.near, disk3.near"


def test_ten_failures_are_one_mail(fleet: Fleet) -> None:
    for number in range(10):
        fleet.add(f"disk{number}", path=f"/dev/disk/by-id/blktrack-test-{number}")
    fleet.write()
    done = fleet.sync("--quiet")
    assert done.code == 1
    assert 20 < len(done.err.splitlines()) <= 32
    assert all(f"disk{number}.near: the device is away" in done.err for number in range(10))


def test_what_goes_on_is_told_again_only_in_time(fleet: Fleet) -> None:
    for name in ("one", "two"):
        fleet.add(name)
    fleet.write()
    quiet = ("--quiet", "--remind", "1h")
    assert fleet.sync(*quiet) == Done(0, "", "")
    kept = fleet.disks["one"].replicas["near"]
    for _ in range(2):
        break_by_hand(kept)
        told = fleet.sync(*quiet)
        assert told.code == 1 and "one.near: " in told.err
        assert fleet.sync(*quiet) == Done(1, "", "")
        assert "one.near" in fleet.sync("--quiet").err, "nobody asked to be spared"
        kept.unlink()
        assert fleet.sync(*quiet) == Done(0, "", "")  # and so a new failure is news
    break_by_hand(kept)
    assert fleet.sync(*quiet).err
    kept.unlink()
    kept.mkdir()
    changed = fleet.sync(*quiet)
    assert changed.code == 1 and "one.near" in changed.err
    kept.rmdir()


def test_a_single_replica_is_told_of_in_time_too(fleet: Fleet) -> None:
    disk = fleet.add("one")
    fleet.lab.track(disk.path)
    target = disk.replicas["near"]
    words = ("sync", disk.path, str(target), "--quiet", "--remind", "1h")
    target.write_bytes(b"precious" * 1000)
    assert_clear(fleet.lab.blktrack(*words), 1, str(target))
    assert fleet.lab.blktrack(*words) == Done(1, "", "")
    assert_clear(fleet.lab.blktrack(*words[:4]), 1, str(target))
    target.unlink()
    assert fleet.lab.blktrack(*words) == Done(0, "", "")
    break_by_hand(target)
    assert_clear(fleet.lab.blktrack(*words), 1, str(target))


def test_a_process_that_is_killed_stops_no_other(fleet: Fleet) -> None:
    fleet.add("victim", ("near", "far"), limit=SLOW)
    fleet.add("other", ("near", "far"))
    fleet.write()
    running = fleet.start("--json", "--jobs", "2")
    os.kill(process_of(fleet, running, "victim"), signal.SIGKILL)
    done = running.end()
    assert done.code == 1
    victim = links(done)["victim.near"]
    assert "SIGKILL" in victim["error"] and victim["hint"] and victim["exit"] == 1
    assert exits(done) == {"victim.near": 1, "victim.far": 0, "other.near": 0, "other.far": 0}
    assert fleet.in_step("other") and fleet.in_step("victim", "far")
    fleet.disks["victim"].keys = {}
    fleet.write()
    again = fleet.sync("--json")
    assert again.code == 0
    report = links(again)["victim.near"]["report"]
    assert report["mode"] == "initial" and fleet.in_step("victim")


@pytest.mark.parametrize(
    ("send", "signum"),
    [(os.kill, signal.SIGTERM), (os.kill, signal.SIGHUP), (os.killpg, signal.SIGINT)],
)
def test_a_signal_ends_all_cleanly(
    fleet: Fleet, send: Callable[[int, int], None], signum: signal.Signals
) -> None:
    """A Ctrl-C goes to the whole group of the terminal."""
    for name in ("one", "two", "three"):
        fleet.add(name, ("near", "far"), limit=SLOW)
    fleet.write()
    running = fleet.start("--jobs", "2")
    processes = [process_of(fleet, running, name) for name in ("one", "two")]
    send(running.process.pid, signum)
    done = running.end()
    assert done.code == 128 + signum
    assert "6 replicas: 6 stopped" in done.out
    assert done.err.count("was interrupted") == 2, "these had begun, and say what `sync` says"
    assert done.err.count("not begun") == 4
    assert not any(map(is_alive, processes))
    fleet.disks |= {name: type(d)(d.path, {}, d.replicas) for name, d in fleet.disks.items()}
    fleet.write()
    assert fleet.sync("--quiet") == Done(0, "", "")
    assert all(fleet.in_step(name, each) for name in fleet.disks for each in ("near", "far"))


def test_a_process_is_told_once(fleet: Fleet) -> None:
    """A second signal would end it on the spot: here it is in a hook, and sees the first late."""
    log = fleet.lab.name("log")
    hook = f"'echo begun >> {log}; sleep 1'"
    fleet.add("one", consistency='"filesystem"', pre_freeze=hook)
    fleet.write()
    running = fleet.start()
    wait_until(log.exists, "the hook")
    os.killpg(running.process.pid, signal.SIGINT)
    done = running.end()
    assert done.code in (0, 128 + signal.SIGINT), done  # it may have been as good as done
    assert "killed" not in done.err


def test_a_killed_parent_leaves_nobody_behind(fleet: Fleet) -> None:
    for name in ("one", "two"):
        fleet.add(name, limit='"16K"')
    fleet.write()
    running = fleet.start()
    processes = [process_of(fleet, running, name) for name in ("one", "two")]
    running.process.kill()
    running.end()
    wait_until(lambda: not any(map(is_alive, processes)), "the end of the processes")
    for disk in fleet.disks.values():
        disk.keys = {}
    fleet.write()
    assert fleet.sync("--quiet") == Done(0, "", ""), "no lock is left"
    assert fleet.in_step("one") and fleet.in_step("two")


def test_rounds_do_not_overlap(fleet: Fleet) -> None:
    fleet.add("one", limit=SLOW)
    fleet.write()
    running = fleet.start()
    process_of(fleet, running, "one")
    quiet = ("--quiet", "--remind", "1h")
    second = fleet.sync(*quiet)
    assert second.code == 6
    assert f"has not ended yet: process {running.process.pid} since 20" in second.err
    assert fleet.sync(*quiet) == Done(6, "", "")
    running.process.terminate()
    assert running.end().code == 128 + signal.SIGTERM


def test_a_long_first_copy_holds_up_no_other(fleet: Fleet) -> None:
    """Replicas that follow already go first, and the next rounds take all that are free."""
    fleet.add("slow", ("late", "near"))
    fleet.add("fast")
    kept = fleet.disks["slow"].replicas.pop("late")
    fleet.write()
    assert fleet.sync("--quiet") == Done(0, "", "")
    fleet.disks["slow"].replicas = {"late": kept} | fleet.disks["slow"].replicas
    fleet.disks["slow"].of_replica["late"] = {"limit": SLOW}
    fleet.write()
    fleet.change(1)
    running = fleet.start("--jobs", "2")
    process_of(fleet, running, "slow")
    assert fleet.in_step("slow") and fleet.in_step("fast")
    for number in (2, 3):
        fleet.change(number)
        done = fleet.sync("--json", "--jobs", "2")
        assert done.code == 6
        assert exits(done) == {"slow.late": 6, "slow.near": 0, "fast.near": 0}
        assert f"process {running.process.pid} since 20" in links(done)["slow.late"]["error"]
        assert fleet.in_step("slow") and fleet.in_step("fast")
    running.process.terminate()
    assert running.end().code == 128 + signal.SIGTERM


def test_all_rounds_share_the_jobs(fleet: Fleet) -> None:
    fleet.add("one", limit=SLOW)
    fleet.write()
    running = fleet.start("--jobs", "1")
    process_of(fleet, running, "one")
    fleet.add("two")
    fleet.write()
    second = fleet.start("--jobs", "1")
    waiting = fleet.lab.store.paths.run / "all/two.near.lock"
    pid = f'"pid": {second.process.pid},'
    wait_until(lambda: waiting.exists() and pid in waiting.read_text(), "the second round")
    assert not fleet.disks["two"].replicas["near"].exists()
    assert second.process.poll() is None
    running.process.terminate()
    running.end()
    assert second.end().code == 6
    assert fleet.in_step("two")


def test_a_replica_that_is_synced_by_hand_is_busy(fleet: Fleet) -> None:
    one = fleet.add("one")
    fleet.add("two")
    fleet.defaults = {"rpo-warning": '"1s"', "rpo-error": '"2s"'}
    fleet.write()
    assert fleet.sync("--quiet").code == 0
    fleet.change(1)
    words = (one.path, str(one.replicas["near"]), "--full", "--limit", "512K")
    by_hand = Running(fleet.lab, "sync", *words)
    by_hand.until_open(one.replicas["near"])
    done = fleet.sync("--json")
    assert done.code == 6
    assert exits(done) == {"one.near": 6, "two.near": 0}
    assert fleet.in_step("two")

    def named() -> bool:
        return "one.near" in (told := fleet.sync("--quiet")).err and "broken" in told.err

    wait_until(named, "the end of what was promised")
    by_hand.process.terminate()
    by_hand.end()


def test_a_broken_promise_is_told_of_what_was_synced(fleet: Fleet) -> None:
    """A round that takes longer than what was promised can never keep it."""
    fleet.add("one")
    fleet.add("two")
    fleet.disks["one"].keys = {"rpo-error": "0.001"}
    fleet.write()
    done = fleet.sync("--quiet", "--remind", "1h")
    assert done.code == 0
    assert "one.near: its newest point is older than was promised" in done.err
    assert "two" in done.err.splitlines()[-1]
    assert fleet.sync("--quiet", "--remind", "1h") == Done(0, "", "")
    assert links(fleet.sync("--json"))["one.near"]["lateness"] == "broken"


def test_each_follows_its_own_policy(fleet: Fleet) -> None:
    log = fleet.lab.name("log")
    for name in ("frozen", "plain", "slow", "coarse", "off"):
        fleet.add(name)
    fleet.disks["frozen"].keys = {
        "consistency": '"filesystem"',
        "pre-freeze": f'"echo $BLKTRACK_PHASE $BLKTRACK_DEVICE >> {log}"',
        "post-freeze": '["echo $BLKTRACK_PHASE >&2; exit 3"]',
    }
    fleet.disks["plain"].keys = {"freeze": "false"}
    fleet.disks["slow"].keys = {"limit": '"2M"'}
    fleet.disks["coarse"].keys = {"granularity": '"64K"'}
    fleet.disks["off"].of_replica = {"near": {"enabled": "false"}}
    run("mkfs.ext4", "-q", fleet.disks["frozen"].path)
    fleet.write()
    with fleet.lab.mounted(fleet.disks["frozen"].path):
        done = fleet.sync("--json")
    found = links(done)
    assert done.code == 0 and set(found) == {
        "frozen.near",
        "plain.near",
        "slow.near",
        "coarse.near",
    }
    reports = {name.partition(".")[0]: link["report"] for name, link in found.items()}
    assert reports["frozen"]["consistency"] == "filesystem" and reports["frozen"]["freeze_s"] > 0
    assert reports["plain"]["consistency"] == "crash" and not reports["plain"]["freeze_s"]
    assert reports["slow"]["duration_s"] > 1, "4 MiB at 2 MiB a second"
    assert log.read_text() == f"pre {fleet.disks['frozen'].path}\n"
    (warning,) = found["frozen.near"]["warnings"]
    assert "ended with code 3: post" in warning
    sizes = {
        name: fleet.lab.status(fleet.disks[name].path)["granularity"]
        for name in ("plain", "coarse")
    }
    assert sizes == {"plain": 4 * KIB, "coarse": 64 * KIB}
    assert not fleet.disks["off"].replicas["near"].exists()
    told = fleet.sync("--quiet")
    assert told.code == 0 and "frozen.near: warning: the post hook" in told.err


def test_the_command_line_goes_over_the_policy(fleet: Fleet) -> None:
    fleet.add("one", limit='"1K"')
    fleet.write()
    assert fleet.sync("--limit", "none", "--quiet") == Done(0, "", "")
    kept = fleet.disks["one"].replicas["near"]
    kept.write_bytes(os.urandom(64 * KIB) + kept.read_bytes()[64 * KIB :])
    assert fleet.sync("--no-resync", "--limit", "none", "--quiet").code == 3
    assert fleet.sync("--limit", "none", "--quiet").code == 0
    assert fleet.in_step("one")


def test_as_many_devices_at_a_time_as_allowed(fleet: Fleet) -> None:
    """Each sync says when its hook begins and ends; the first ones wait there for a second to come,
    and give a third the time to."""
    log = fleet.lab.name("log")
    log.touch()
    for number in range(5):
        fleet.add(f"disk{number}", ("near", "far"))
        wait = "for i in $(seq {}); do [ $(grep -c + {}) -ge {} ] && break; sleep 0.05; done"
        second, third = wait.format(200, log, 2), wait.format(20, log, 3)
        hook = f"echo + disk{number} >> {log}; {second}; {third}; echo - disk{number} >> {log}"
        fleet.disks[f"disk{number}"].keys = {
            "consistency": '"filesystem"',
            "pre-freeze": f"'{hook}'",
        }
    fleet.defaults = {"jobs": "2"}
    fleet.write()
    assert fleet.sync("--quiet") == Done(0, "", "")
    running: set[str] = set()
    most = 0
    for line in log.read_text().splitlines():
        word, name = line.split()
        if word == "+":
            assert name not in running, "two replicas of one device at a time"
            running.add(name)
        else:
            running.remove(name)
        most = max(most, len(running))
    assert most == 2


def test_a_device_that_was_untracked_by_hand_is_left_alone(fleet: Fleet) -> None:
    one = fleet.add("one")
    fleet.add("two")
    fleet.write()
    assert fleet.sync("--quiet").code == 0
    fleet.lab.untrack(one.path)
    done = fleet.sync()
    assert done.code == 3
    assert f"{one.path} was untracked by hand" in done.err
    assert f"blktrack track {one.path}" in done.err and "enabled = false" in done.err
    assert "1 synced, 1 failed" in done.out
    fleet.lab.track(one.path)
    assert fleet.sync("--quiet").code == 0


def test_a_policy_that_cannot_be_followed(fleet: Fleet) -> None:
    assert_clear(fleet.sync(), 2, str(fleet.policy), "does not exist")
    fleet.write('[device.a]\npath = "/dev/loop0"\nconsistnecy = "none"\n')
    done = fleet.sync("--quiet", "--remind", "1h")
    assert_clear(done, 2, "device.a.consistnecy", "consistency")
    assert fleet.sync("--quiet", "--remind", "1h") == Done(2, "", "")
    fleet.write("[defaults]\njobs = 2\n")
    assert_clear(fleet.sync(), 2, "names no device")


@pytest.mark.parametrize(
    "words",
    [
        ("/dev/loop0",),
        ("--full",),
        ("--force",),
        ("--in-place",),
        ("--no-freeze",),
        ("--consistency", "none"),
        ("--freeze-cap", "1"),
        ("--pre-freeze", "true"),
        ("--jobs", "0"),
        ("--remind", "soon"),
    ],
)
def test_what_makes_no_sense_for_all(lab: Lab, words: tuple[str, ...]) -> None:
    done = lab.blktrack("sync", "--all", *words)
    assert done.code == 2 and done.err.startswith("blktrack sync: "), done.err
    assert words[0] in done.err and TRACEBACK not in done.err


@pytest.mark.parametrize("words", [(), ("/dev/loop0",), ("/dev/loop0", "/x", "--jobs", "2")])
def test_a_single_sync_needs_both_names(lab: Lab, words: tuple[str, ...]) -> None:
    assert lab.blktrack("sync", *words).code == 2


def test_progress_on_a_terminal_has_a_row_for_each(fleet: Fleet) -> None:
    for name in ("one", "two"):
        fleet.add(name, limit='"1M"')
    fleet.write()
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "blktrack", "sync", "--all"],
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    fleet.lab.stack.callback(process.wait)
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            seen += os.read(master, 4096)
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(master)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"one.near initial" in seen and b"two.near initial" in seen and b"MiB" in seen
    assert b"\x1b" not in out and b"2 replicas: 2 synced" in out
