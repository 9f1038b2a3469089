"""`send` and `recv`: a delta through a pipe or a file, and what is lost on its way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blktrack import send as sending
from blktrack.errors import NoPoint
from blktrack.tracker.tracker import find
from blktrack.units import KIB, MIB
from tests.blockdev import TOP, Lab, read_image, resize, run, told, write_direct
from tests.chains import CHAIN, judge
from tests.streams import LINK, SIZE, Hosts, hosts
from tests.test_points import CHAINS, PACES, Swaps, swaps, writers

__all__ = ["hosts", "swaps"]  # fixtures

pytestmark = pytest.mark.needs("root", "loop", "bpf")


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
    # How many are reached is up to what else the machine does.
    assert rounds > reached >= 1
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
