"""`send` and `recv`: a delta through a pipe or a file, refused unless it is whole and fits."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack import send as sending
from blktrack.errors import BlktrackError, NoPoint
from blktrack.options import Options
from blktrack.ship.delta.format import MAGIC
from blktrack.ship.stage import is_left
from blktrack.tracker.tracker import find
from blktrack.units import KIB, MIB
from tests.blockdev import TOP, Done, Lab, read_image, resize, run, told, wait_until, write_direct
from tests.chains import CHAIN, judge
from tests.increments import FILES, ON_THE_WAY
from tests.streams import LINK, Hosts
from tests.test_points import CHAINS, PACES, Swaps, swaps, writers

__all__ = ["swaps"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop", "bpf")
SIZE = 16 * MIB


@pytest.fixture
def hosts(shared: Lab) -> Hosts:
    """With a replica in step."""
    made = Hosts(shared, SIZE)
    assert made.carry().mode == "initial"
    return made


@pytest.mark.parametrize("kind", ["file", "device"])
def test_all_then_what_changed_then_nothing(shared: Lab, kind: str) -> None:
    target = shared.loop(SIZE + MIB) if kind == "device" else None
    hosts = Hosts(shared, SIZE, target=target)
    first = hosts.carry()
    assert (first.mode, first.base, first.consistency) == ("initial", None, "crash")
    assert hosts.identical()
    hosts.change(MIB)
    hosts.change(5 * MIB, 512)
    hosts.change(SIZE - 4 * KIB, 4 * KIB)
    second = hosts.carry()
    assert (second.mode, second.base) == ("incremental", first.epoch)
    assert second.bytes_wire < 128 * KIB
    assert hosts.identical()
    third = hosts.carry()
    assert (third.mode, third.base, third.extents) == ("nothing", second.epoch, 0)
    replica = hosts.replica()
    assert (replica.state, replica.reason) == ("ready", "")
    assert (replica.epoch, replica.point) == (third.epoch, third.point)
    assert (replica.consistency, replica.source) == ("crash", hosts.source)
    (link,) = shared.status(hosts.source)["links"]
    assert (link["name"], link["target"], link["state"]) == (LINK, "", "ready")
    assert (link["epoch"], link["pending_bytes"]) == (third.epoch, 0)


def test_a_pipe_of_a_shell(shared: Lab) -> None:
    hosts = Hosts(shared, SIZE)
    blktrack = f"{sys.executable} -m blktrack"
    line = (
        f"set -o pipefail; {blktrack} send {hosts.source} --link {LINK} --compress 1 |"
        f" BLKTRACK_ROOT={hosts.root} {blktrack} recv {hosts.target}"
    )
    done = subprocess.run(
        ["bash", "-c", line], cwd=TOP, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "replica is at epoch" in done.stdout and f"--link {LINK} --commit 1" in done.stderr
    assert hosts.identical()


def test_compression_makes_it_smaller(hosts: Hosts) -> None:
    write_direct(hosts.source, 0, b"a line that comes back\n\n" * (MIB // 8))
    plain, report = hosts.sent()
    packed, done = hosts.send("--compress", "3")
    assert json.loads(done.err)["bytes_wire"] == len(packed)
    assert len(packed) < len(plain) // 2
    assert report.bytes_wire == len(plain)
    assert hosts.received(packed).bytes_shipped == report.bytes_shipped
    assert (read_image(hosts.source) == read_image(hosts.target)).all()


def test_points_of_a_busy_source_keep_the_order_of_writes(shared: Lab, swaps: Swaps) -> None:
    """Rounds append to one stream: a later frame overrides an earlier one."""
    hosts = Hosts(shared, CHAINS * CHAIN)
    hosts.carry()
    reached = rounds = 0
    with writers(hosts.source, shared.name("log"), PACES["brisk"]) as log:
        for _ in range(100):
            if reached >= 10 and rounds > reached:
                break
            try:
                report = hosts.carry()
            except NoPoint:
                continue
            reached, rounds = reached + 1, rounds + report.rounds
            image = read_image(hosts.target)
            for chain in range(CHAINS):
                least = log.completed_before(chain, report.point)
                most = log.begun_by(chain, swaps.end_of(report.point))
                assert not (fault := judge(image, chain, least, most).fault), fault
    assert rounds > reached >= 10
    told(f"streamed, brisk: {reached} points in {rounds / reached:.1f} rounds each, all in order")


def test_a_source_that_grows(shared: Lab) -> None:
    hosts = Hosts(shared, SIZE)
    hosts.carry()
    backing = Path(run("losetup", "--noheadings", "--output=BACK-FILE", hosts.source))
    resize(hosts.source, backing, SIZE + 3 * MIB)
    hosts.size = SIZE + 3 * MIB
    hosts.change(SIZE - MIB, 2 * MIB)
    assert hosts.carry().mode == "incremental"
    assert hosts.target.stat().st_size == hosts.size
    assert (read_image(hosts.source) == read_image(hosts.target)).all()


# What is lost on the way.


def test_a_lost_delta_costs_another_one(hosts: Hosts) -> None:
    for number in range(3):
        hosts.change(number * MIB, number=number + 2)
        _, report = hosts.sent()
        assert report.mode == "incremental"
    assert hosts.carry().bytes_changed == 3 * 64 * KIB
    assert hosts.identical()
    assert hosts.sent()[1].mode == "nothing"


def test_a_commit_of_an_older_delta_forgets_nothing(hosts: Hosts) -> None:
    hosts.change(MIB)
    first, report = hosts.sent()
    hosts.change(2 * MIB)
    hosts.sent()
    hosts.received(first)
    hosts.commit(report.epoch)
    hosts.carry()
    assert hosts.identical()


@pytest.mark.parametrize("place", ["send-begun", "send-recorded", "take-done"])
def test_a_commit_after_a_later_send_died(hosts: Hosts, place: str) -> None:
    """What that one had taken is not what is committed."""
    hosts.change(MIB)
    first, report = hosts.sent()
    hosts.change(2 * MIB)
    assert hosts.send(env={"BLKTRACK_CRASH": place})[1].code == -signal.SIGKILL
    hosts.received(first)
    hosts.commit(report.epoch)
    hosts.carry()
    assert hosts.identical()


def test_a_commit_that_dies_is_said_again(hosts: Hosts) -> None:
    hosts.change(MIB)
    delta, report = hosts.sent()
    epoch = hosts.received(delta).epoch
    words = ("send", hosts.source, "--link", LINK, "--commit", str(epoch))
    died = hosts.lab.blktrack(*words, env={"BLKTRACK_CRASH": "send-committed"})
    assert died.code == -signal.SIGKILL
    hosts.change(3 * MIB)
    hosts.commit(epoch)
    again = hosts.carry()
    assert (again.mode, again.base) == ("incremental", report.epoch)
    assert hosts.identical()


def test_what_a_commit_refuses(hosts: Hosts) -> None:
    hosts.change(MIB)
    _, report = hosts.sent()
    wrong = report.epoch + 1
    done = hosts.lab.blktrack("send", hosts.source, "--link", LINK, "--commit", str(wrong))
    assert done.code == 1
    assert f"no stream of link {LINK} leads to epoch {report.epoch + 1}" in done.err
    done = hosts.lab.blktrack("send", hosts.source, "--link", "none", "--commit", "1")
    assert done.code == 2 and "has no link none" in done.err
    assert hosts.lab.blktrack("send", hosts.source, "--link", LINK, "--commit", "x").code == 2
    hosts.carry()
    assert hosts.identical()


def test_after_a_doubt_all_of_it_goes_and_the_old_point_is_kept_until_then(hosts: Hosts) -> None:
    before = hosts.replica()
    hosts.lab.untrack(hosts.source)
    hosts.change(MIB)
    hosts.lab.track(hosts.source)
    refused = hosts.send("--no-resync")[1]
    assert refused.code == 3 and "needs a resync: it was untracked" in refused.err
    delta, report = hosts.sent()
    assert (report.mode, report.base) == ("resync", None)
    assert report.reason == "it was untracked"
    image = read_image(hosts.target).copy()
    assert hosts.recv(delta[:-20]).code == 1
    assert (read_image(hosts.target) == image).all()
    assert hosts.replica() == before
    hosts.received(delta)
    hosts.commit(report.epoch)
    assert hosts.identical()
    hosts.change(2 * MIB)
    assert hosts.carry().mode == "incremental"
    assert hosts.identical()


def test_an_initial_copy_that_breaks_off(shared: Lab) -> None:
    hosts = Hosts(shared, SIZE)
    delta, report = hosts.sent()
    assert "ends after" in hosts.recv(delta[: 5 * MIB]).err
    replica = hosts.replica()
    assert (replica.state, replica.point) == ("unfinished", None)
    hosts.change(MIB)
    hosts.carry()
    assert hosts.identical()
    assert report.mode == "initial"


# What does not fit.


def flipped(delta: bytes) -> bytes:
    data = bytearray(delta)
    data[len(data) // 2] ^= 1
    return bytes(data)


def newer(delta: bytes) -> bytes:
    """Of the next version, with the checksum that it would have."""
    from blktrack.ship.delta.format import PREAMBLE, _seal

    fields = list(PREAMBLE.unpack(delta[: PREAMBLE.size]))
    fields[1] += 1
    return _seal(PREAMBLE.pack(*fields)) + delta[PREAMBLE.size :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "the delta is empty"),
    "no delta": (lambda _: b"\x89PNG\r\n\x1a\n" * 9, "this is not a delta"),
    "cut in its header": (lambda delta: delta[:50], "the delta ends after 50 bytes"),
    "cut before its trailer": (lambda delta: delta[:-300], "the delta ends after"),
    "cut in its digest": (lambda delta: delta[:-1], "the delta ends after"),
    "damaged": (flipped, "the delta is damaged"),
    "newer": (newer, "the delta needs a newer blktrack"),
    "with more behind it": (lambda delta: delta + b"x", "something follows its trailer"),
    "doubled": (lambda delta: delta + delta, "something follows its trailer"),
}


def test_what_recv_refuses_changes_nothing(hosts: Hosts) -> None:
    hosts.change(MIB, 2 * MIB)
    delta, _ = hosts.sent()
    before, image = hosts.replica(), read_image(hosts.target).copy()
    seen = hosts.target.stat().st_mtime_ns
    for name, (damage, message) in DAMAGES.items():
        done = hosts.recv(damage(delta))
        assert done.code == 1, name
        assert message in done.err and "  -> " in done.err, f"{name}: {done.err}"
        assert "Traceback" not in done.err and not done.out
        assert (read_image(hosts.target) == image).all()
        assert hosts.replica() == before, name
        assert hosts.target.stat().st_mtime_ns == seen
    assert delta.startswith(MAGIC)
    hosts.received(delta)
    assert hosts.identical()


def test_mutated_deltas_change_nothing(hosts: Hosts, seed: int) -> None:
    """Bits flipped, parts lost, repeated, exchanged or put in: each is refused."""
    for number in range(24):
        hosts.change(number * 640 * KIB, 4 * KIB, number=number + 2)
    delta, _ = hosts.sent()
    before, image, chance = hosts.replica(), read_image(hosts.target).copy(), random.Random(seed)
    for _ in range(400):
        data = bytearray(delta)
        for _ in range(chance.choice([1, 1, 1, 4])):
            start = chance.randrange(len(data))
            part = data[start : start + chance.choice([1, 48, 4096 + 48])]
            match chance.randrange(4):
                case 0:
                    data[start] ^= 1 << chance.randrange(8)
                case 1:
                    del data[start : start + len(part)]
                case 2:
                    data[start:start] = part
                case 3:
                    data[start : start + len(part)] = chance.randbytes(len(part))
        if data == delta:
            continue
        with pytest.raises(BlktrackError):
            hosts.received(bytes(data))
        assert not is_left(Path(f"{hosts.target}.blktrack"))
    assert (read_image(hosts.target) == image).all()
    assert hosts.replica() == before
    hosts.received(delta)
    assert hosts.identical()


def test_a_delta_that_starts_elsewhere(hosts: Hosts) -> None:
    hosts.change(MIB)
    first, report = hosts.sent()
    hosts.received(first)
    done = hosts.recv(first)  # again
    assert done.code == 1 and f"is at epoch {report.epoch}" in done.err
    assert f"--commit {report.epoch}" in done.err
    hosts.commit(report.epoch)
    hosts.change(2 * MIB)
    second, report = hosts.sent()
    hosts.commit(report.epoch)  # by mistake: it was never received
    hosts.change(3 * MIB)
    third, _ = hosts.sent()
    done = hosts.recv(third)
    assert done.code == 1 and "the delta starts at epoch" in done.err and "--full" in done.err
    hosts.received(second)
    hosts.received(third)
    assert hosts.identical()


def test_a_full_copy_that_leads_back(hosts: Hosts) -> None:
    old, report = hosts.sent(Options(full=True))
    image = read_image(hosts.source).copy()
    hosts.change(MIB)
    hosts.carry(Options(full=True))
    done = hosts.recv(old)
    assert done.code == 1 and f"leads back to epoch {report.epoch}" in done.err
    assert hosts.identical()
    assert hosts.recv(old, "--force").json["epoch"] == report.epoch
    assert (read_image(hosts.target) == image).all()


def test_a_delta_for_another_replica(hosts: Hosts, shared: Lab) -> None:
    other = Hosts(shared, SIZE)
    full, _ = other.sent()
    other.received(full)
    image, before = read_image(hosts.target).copy(), hosts.replica()
    for delta in (full, other.sent()[0]):
        done = hosts.recv(delta)
        assert done.code == 1
        assert "belongs to another link of" in done.err and "--force" in done.err
    hosts.change(MIB)
    delta, _ = hosts.sent()
    fresh = shared.name("fresh")
    done = hosts.recv(delta, target=fresh)
    assert done.code == 1 and "is not a replica of" in done.err and "--full" in done.err
    assert not fresh.exists()
    assert (read_image(hosts.target) == image).all()
    assert hosts.replica() == before
    # What is not a replica at all is not taken either.
    fresh.write_bytes(b"precious")
    done = hosts.recv(full, target=fresh)
    assert done.code == 1 and "is a file with data in it" in done.err
    assert fresh.read_bytes() == b"precious"


def test_a_replica_that_others_wrote_to(hosts: Hosts) -> None:
    with hosts.target.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"rude")
    hosts.change(MIB)
    done = hosts.recv(hosts.sent()[0])
    assert done.code == 1 and "is not as it was left: it was written to" in done.err
    assert hosts.replica().state == "changed"
    hosts.carry(Options(full=True))
    assert hosts.identical()
    assert hosts.replica().state == "ready"


def test_targets_that_cannot_hold_it(hosts: Hosts, shared: Lab) -> None:
    delta, _ = hosts.sent(Options(full=True))
    small = shared.loop(SIZE - MIB)
    done = hosts.recv(delta, target=small)
    assert done.code == 1 and "is too small" in done.err
    done = hosts.recv(delta, target=hosts.lab.folder)
    assert done.code == 1 and "is a directory" in done.err
    hosts.change(5 * MIB, 512)
    coarse = Hosts(shared, SIZE, target=shared.loop(SIZE, sector=4096))
    coarse.carry()
    coarse.change(5 * MIB, 512)
    coarse.carry()  # granules are large enough
    assert coarse.identical()


# Death and interruption.


def test_death_of_the_receiver_at_every_place(hosts: Hosts) -> None:
    """The replica is at its old point or at the new one, once anybody has looked at it."""
    found = {"old": 0, "new": 0}
    for number, place in enumerate([*ON_THE_WAY, *FILES]):
        old = read_image(hosts.target).copy()
        hosts.change(number % 12 * MIB, 256 * KIB, number=number + 2)
        delta, report = hosts.sent()
        died = hosts.recv(delta, env={"BLKTRACK_CRASH": place})
        assert died.code == -signal.SIGKILL, place
        replica = hosts.replica()
        assert replica.state == "ready", replica
        if replica.epoch == report.epoch:
            found["new"] += 1
            assert hosts.identical()
            hosts.commit(report.epoch)
        else:
            found["old"] += 1
            assert (read_image(hosts.target) == old).all()
            assert hosts.received(delta).epoch == report.epoch
            hosts.commit(report.epoch)
    assert all(found.values()), found
    assert hosts.identical()


def test_interrupted_while_it_waits_for_more(hosts: Hosts) -> None:
    hosts.change(MIB, MIB)
    delta, _ = hosts.sent()
    before = hosts.replica()
    staged = Path(f"{hosts.target}.blktrack/incoming.pack")
    running = subprocess.Popen(
        [sys.executable, "-m", "blktrack", "recv", str(hosts.target)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=TOP,
        env={**os.environ, **hosts.there},
    )
    assert running.stdin is not None
    running.stdin.write(delta[:-100])
    running.stdin.flush()
    wait_until(lambda: staged.exists() and staged.stat().st_blocks > 0, "some of it to be staged")
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM
    assert b"receiving was interrupted" in err and b"Traceback" not in err
    assert not staged.exists()
    assert hosts.replica() == before
    hosts.received(delta)
    assert hosts.identical()


def test_a_receiver_that_goes_away(hosts: Hosts) -> None:
    hosts.change(0, 8 * MIB)
    running = subprocess.Popen(
        [sys.executable, "-m", "blktrack", "send", hosts.source, "--link", LINK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TOP,
    )
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    err = running.stderr.read()
    assert running.wait(60) == 1
    running.stderr.close()
    assert "whoever was to take the delta went away" in err and "Traceback" not in err
    assert hosts.carry().mode == "incremental"
    assert hosts.identical()


def test_one_at_a_time(hosts: Hosts) -> None:
    hosts.change(0, 8 * MIB)
    running = subprocess.Popen(
        [sys.executable, "-m", "blktrack", "send", hosts.source, "--link", LINK, "--quiet"],
        stdout=subprocess.PIPE,
        cwd=TOP,
    )
    assert running.stdout is not None
    head = running.stdout.read(100)
    for words in (["--quiet"], ["--commit", "1"]):
        done = hosts.send(*words)[1]
        assert done.code == 6 and f"link {LINK} is held by another run" in done.err
    rest = running.stdout.read()
    assert running.wait(60) == 0
    running.stdout.close()
    hosts.received(head + rest)
    assert hosts.identical()


@pytest.mark.parametrize("words", [["send", "DEVICE", "--link", "x"], ["recv", "TARGET"]])
def test_a_terminal_is_no_stream(hosts: Hosts, words: list[str]) -> None:
    words = [{"DEVICE": hosts.source, "TARGET": str(hosts.target)}.get(w, w) for w in words]
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "blktrack", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=TOP,
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert "terminal" in done.stderr and "  -> " in done.stderr


def test_wrong_words(hosts: Hosts) -> None:
    def refused(*words: str) -> Done:
        done = hosts.lab.blktrack("send", *words)
        assert done.code in (2, 3)
        assert "Traceback" not in done.err
        return done

    assert "--link" in refused(hosts.source).err
    assert "is empty" in refused(hosts.source, "--link", "").err
    for level in ("0", "20", "x", "-1"):
        assert "level" in refused(hosts.source, "--link", LINK, "--compress", level).err
    assert "is not tracked" in refused(hosts.lab.loop(SIZE), "--link", LINK).err


def test_a_replica_that_a_sync_made_goes_on_by_streams(hosts: Hosts, shared: Lab) -> None:
    """Seeded on a disk of this host that is then carried elsewhere."""
    seed = shared.name("seed")
    shared.sync(hosts.source, seed)
    hosts.link, hosts.target = seed.name, shared.name("carried")
    shutil.copytree(f"{seed}.blktrack", f"{hosts.target}.blktrack")
    os.rename(seed, hosts.target)
    hosts.change(MIB)
    report = hosts.carry()
    assert report.mode == "incremental"
    assert hosts.identical()


def test_without_its_memory_of_more_was_taken_a_change_would_be_lost(hosts: Hosts) -> None:
    """And the oracle of `test_a_commit_after_a_later_send_died` would see it."""
    hosts.change(MIB)
    first, report = hosts.sent()
    hosts.change(2 * MIB)
    hosts.send(env={"BLKTRACK_CRASH": "send-begun"})
    hosts.received(first)
    store = hosts.lab.store
    state, _ = find(store, hosts.source)
    link = sending.find_link(store, state.id, LINK)
    assert link is not None and not link.settles
    link.settles = True
    store.save_link(state.id, link)
    hosts.commit(report.epoch)
    hosts.carry()
    assert not hosts.identical()


def test_json_of_both_sides(shared: Lab) -> None:
    hosts = Hosts(shared, SIZE)
    delta, said = hosts.send()
    report, done = json.loads(said.err), hosts.recv(delta).json
    same = ("epoch", "point", "consistency", "bytes_shipped", "bytes_wire")
    assert {key: report[key] for key in same} == {key: done[key] for key in same}
    words = ("send", hosts.source, "--link", LINK, "--commit", str(done["epoch"]), "--json")
    assert shared.blktrack(*words).json["epoch"] == report["epoch"]
    told = shared.blktrack("status", hosts.target, "--json", env=hosts.there).json
    (replica,) = told["replicas"]
    assert told["devices"] == []
    assert (replica["state"], replica["epoch"]) == ("ready", report["epoch"])
    text = shared.blktrack("status", hosts.target, env=hosts.there).out
    assert f"replica of {hosts.source}  ready" in text and "consistency crash" in text
