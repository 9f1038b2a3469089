"""What `top` tells of real devices, against what was done to them; and that it disturbs nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blktrack import bitmap, durable
from blktrack.bpf import libbpf
from blktrack.cli import main
from blktrack.device import device_id
from blktrack.report import TopDevice, TopReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker import scan, status
from blktrack.tracker.live import Live
from blktrack.tracker.opening import hold
from blktrack.units import KIB, MIB
from tests.blockdev import TOP, Lab, resize, run, wait_until, write_direct
from tests.fixtures import every_kind
from tests.tmux import PROMPT, Terminal

pytestmark = pytest.mark.needs("root", "loop", "bpf")

GRANULE = 4 * KIB


@contextlib.contextmanager
def watching(lab: Lab, path: str) -> Iterator[Callable[[], TopDevice]]:
    """Readings of one device, a second's worth of pauses left out."""
    with contextlib.closing(Live(lab.store, [device_id(BlockDevice.find(path))])) as live:

        def look() -> TopDevice:
            (found,) = live.look().devices
            return found

        yield look


def settled(look: Callable[[], TopDevice], dirty: int) -> TopDevice:
    """A reading made after the maps were searched again."""
    found: list[TopDevice] = []

    def met() -> bool:
        found[:] = [look()]
        return found[0].dirty_bytes == dirty

    wait_until(met, f"{dirty} dirty bytes")
    return found[0]


def write_blocks(path: str, blocks: list[int]) -> None:
    for block in blocks:
        write_direct(path, block * GRANULE, os.urandom(GRANULE))


def tree(*folders: Path) -> dict[str, tuple[int, str]]:
    """Everything below, with the time of its last change and what it holds."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            data = path.read_bytes() if path.is_file() and "bpf" not in path.parts else b""
            found[str(path)] = (path.stat().st_mtime_ns, hashlib.sha256(data).hexdigest())
    return found


@every_kind
def test_figures_are_what_was_written(shared: Lab, kind: str, seed: int) -> None:
    size = 64 * MIB
    device = shared.device(kind, size)[0]
    shared.track(device, GRANULE)
    blocks = random.Random(seed).sample(range(size // GRANULE), 300)
    with watching(shared, device) as look:
        first = look()
        assert (first.state, first.reason, first.dirty_bytes, first.losses) == (
            "tracking",
            "",
            0,
            0,
        )
        assert first.write_rate is None and not any(first.heat)
        write_blocks(device, blocks)
        second = look()
        assert second.writes - first.writes == len(blocks)
        assert second.written_bytes - first.written_bytes == len(blocks) * GRANULE
        assert second.write_rate and second.writes_rate
        assert second.write_rate / second.writes_rate == pytest.approx(GRANULE)
        third = settled(look, len(blocks) * GRANULE)
        assert third.heat == pytest.approx(
            heat_of(set(blocks), bitmap.granules_for(third.size, GRANULE)), abs=1e-4
        )
        quiet = look()
        assert (quiet.write_rate, quiet.writes_rate, quiet.dirty_rate) == (0.0, 0.0, 0.0)
        write_blocks(device, blocks[:50])
        again = settled(look, len(blocks) * GRANULE)
        assert again.writes == third.writes + 50, "known to be dirty, but written"


def heat_of(dirty: set[int], granules: int) -> list[float]:
    cells = min(scan.CELLS, granules)
    edges = [cell * granules // cells for cell in range(cells + 1)]
    return [
        sum(granule in dirty for granule in range(first, last)) / (last - first)
        for first, last in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("granules", [1, 63, 255, 256, 257, 5000, 16384, 16385, 40_961, 100_003])
def test_heat_of_any_bitmap(granules: int, seed: int) -> None:
    chance = random.Random(seed)
    for share in (0.001, 0.1, 0.9):
        dirty = {granule for granule in range(granules) if chance.random() < share}
        words = np.zeros(bitmap.words_for(granules), dtype=np.uint64)
        bitmap.set_bits(words, np.array(sorted(dirty), dtype=np.int64))
        index = bitmap.nonzero(words)
        found = scan.heat(words, index, scan.popcount(words[index]), granules)
        truth = heat_of(dirty, granules)
        assert found == pytest.approx(truth, abs=1e-4)
        assert [bool(cell) for cell in found] == [bool(cell) for cell in truth]


def test_a_sync_by_another_process_goes_by(shared: Lab) -> None:
    device, target = shared.loop(32 * MIB), shared.name("replica")
    shared.track(device)
    with watching(shared, device) as look:
        write_blocks(device, [3, 5, 7])
        assert look().links == []
        assert shared.blktrack("sync", device, target, "--quiet").code == 0
        write_blocks(device, list(range(100, 120)))
        found = settled(look, 20 * GRANULE)
        (link,) = found.links
        assert (link.target, link.state, link.consistency) == (str(target), "ready", "crash")
        assert link.pending_bytes == 20 * GRANULE
        assert link.point and link.lag_s is not None and link.lag_s < 60
        assert shared.blktrack("sync", device, target, "--quiet").code == 0
        found = settled(look, 0)
        assert found.links[0].pending_bytes == 0 and found.links[0].epoch == found.epoch
        assert shared.blktrack("verify", device, target).code == 0


def test_nothing_is_missed_while_others_drain(shared: Lab, seed: int) -> None:
    """Bits move from map to set while they are read: each is found in one place or the other."""
    size = 256 * MIB
    device, target = shared.loop(size), shared.name("replica")
    watch = shared.track(device)
    shared.sync(device, target)
    (link,) = shared.store.links(watch.state.id)
    blocks = random.Random(seed).sample(range(size // GRANULE), 400)
    written, failed = 0, []
    done = threading.Event()

    def write_and_drain() -> None:
        nonlocal written
        try:
            for block in blocks:
                write_blocks(device, [block])
                written += 1
                if written % 3 == 0:
                    watch.drain()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    with contextlib.closing(Live(shared.store, [watch.state.id])) as live:
        writer = threading.Thread(target=write_and_drain)
        writer.start()
        looks = 0
        try:
            while not done.is_set():
                for seen in live._devices.values():
                    seen._scan = None  # search at each look: it is the search that is tested
                before = written
                (found,) = live.look().devices
                after = written + 1
                assert (found.state, found.reason) == ("tracking", "")
                pending = found.links[0].pending_bytes
                assert pending is not None
                assert before * GRANULE <= pending <= after * GRANULE, f"in look {looks}"
                looks += 1
        finally:
            writer.join()
    assert not failed and looks > 20
    assert status.status(shared.store, device)[0].links[0].pending_bytes == 400 * GRANULE
    assert link.target == str(target)


def test_it_needs_no_lock(shared: Lab) -> None:
    device = shared.loop(8 * MIB)
    watch = shared.track(device)
    write_blocks(device, [1])
    store = shared.store
    with hold(store, watch.state.id, device), durable.lock(store.kernel_lock, what="all"):
        done = shared.blktrack("top", device, "--once", "--json", "--interval", "0.1")
        (found,) = done.json["devices"]
        assert found["state"] == "tracking" and found["dirty_bytes"] == GRANULE


def test_nothing_changes(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a doubt is found: it is told, and left to who may record it."""
    device, target = shared.loop(8 * MIB), shared.name("replica")
    watch = shared.track(device)
    shared.sync(device, target)
    write_blocks(device, [1, 2])
    folders = (shared.store.paths.lib, shared.store.paths.run, shared.store.paths.pins)
    places = (*folders, Path(f"{target}.blktrack"))
    before = tree(*places)
    words = ("top", device, "--once", "--json", "--interval", "0.1")
    (found,) = shared.blktrack(*words).json["devices"]
    assert found["state"] == "tracking"
    (found,) = shared.blktrack(*words, env={"BLKTRACK_BOOT_ID": "another"}).json["devices"]
    assert found["state"] == "gap" and "rebooted" in found["reason"]
    assert found["links"][0]["pending_bytes"] is None and found["dirty_bytes"] is None
    assert tree(*places) == before
    assert watch.state.generation and not watch.state.doubts


def test_losses_are_told(shared: Lab) -> None:
    """Writes beyond the end that is tracked: the device grew, and nobody has noticed yet."""
    file = shared.name("disk")
    device = shared.loop(8 * MIB, file=file)
    watch = shared.track(device)
    resize(device, file, 16 * MIB)
    write_direct(device, 12 * MIB, bytes(GRANULE))
    with watching(shared, device) as look:
        found = look()
        assert (found.state, found.size, found.losses > 0) == ("tracking", 8 * MIB, True)
        watch.drain()  # it goes on with the size that it has now
        found = look()
        assert (found.state, found.size, found.losses) == ("tracking", 16 * MIB, 0)


def test_a_device_that_goes_and_comes(lab: Lab) -> None:
    file = lab.name("disk")
    device = lab.own_loop(8 * MIB, file)
    number = device_id(BlockDevice.find(device))
    lab.track(device)
    write_blocks(device, [1])
    with contextlib.closing(Live(lab.store, [number])) as live:

        def states() -> list[tuple[str, str]]:
            return [(found.state, found.reason) for found in live.look().devices]

        assert states() == [("tracking", "")]
        opened = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            run("losetup", "--detach", device)
            wait_until(lambda: states()[0][0] == "absent", "its absence")
            run("losetup", device, file)
            wait_until(lambda: states()[0][0] == "gap", "its return")
            assert "re-created" in states()[0][1]
            lab.untrack(device)
            assert states() == []
            lab.track(device)
            (found,) = live.look().devices
            assert (found.state, found.write_rate, found.dirty_bytes) == ("tracking", None, 0)
            assert len(os.listdir("/proc/self/fd")) == opened
        lab.untrack(device)
        assert states() == []


def test_detached_programs_are_told(lab: Lab) -> None:
    device = lab.loop(8 * MIB)
    lab.track(device)
    with watching(lab, device) as look:
        assert look().state == "tracking"
        for pin in lab.store.paths.pins.rglob("link_blk_rq_complete"):
            pin.unlink()
        found = look()
        assert found.state == "gap" and "no longer pinned" in found.reason
    for pin in lab.store.paths.pins.rglob("slot_*_b"):
        pin.unlink()
    with watching(lab, device) as look:
        found = look()
        assert found.state == "gap" and "dirty maps of slot 0" in found.reason
        for pin in lab.store.paths.pins.rglob("windows"):
            pin.unlink()
        found = look()
        assert found.state == "gap" and "maps are gone" in found.reason


def test_cost_is_told_while_the_kernel_times(shared: Lab) -> None:
    device = shared.loop(8 * MIB)
    shared.track(device)
    with contextlib.closing(Live(shared.store)) as live:
        fd = libbpf.enable_stats()
        try:
            live.look()
            write_blocks(device, list(range(100)))
            report = live.look()
        finally:
            os.close(fd)
    (found,) = [entry for entry in report.devices if entry.device == device]
    assert found.cost_ns is not None and 20 < found.cost_ns < 1e6
    assert report.programs_share is not None and 0 < report.programs_share < 1


def test_the_promise_and_the_time_to_go(shared: Lab) -> None:
    device, target = shared.loop(64 * MIB), shared.name("replica")
    shared.track(device)
    write_blocks(device, list(range(64)))
    assert shared.blktrack("sync", device, target, "--quiet").code == 0
    write_blocks(device, list(range(64)))
    policy = shared.store.paths.policy
    policy.parent.mkdir(parents=True, exist_ok=True)
    text = f'[device.d]\npath = "{device}"\n[device.d.replica.r]\ntarget = "{target}"\n'
    words = ("top", device, "--once", "--json", "--interval", "0.1")
    try:
        for rpo, lateness in (("1h", "ok"), ('1h"\nrpo-warning = "0.001s', "late")):
            policy.write_text(f'{text}rpo = "{rpo}"\n')
            (link,) = shared.blktrack(*words).json["devices"][0]["links"]
            assert (link["lateness"], bool(link["rpo_s"])) == (lateness, True)
            assert link["sync_rate"] > 0
            assert link["eta_s"] == pytest.approx(link["pending_bytes"] / link["sync_rate"])
            assert link["pending_bytes"] == 64 * GRANULE
        policy.write_text("[defaults]\nrpo = 'soon'\n")
        done = shared.blktrack(*words)
        assert done.code == 0 and "warning" in done.err and str(policy) in done.err
    finally:
        policy.unlink()


def test_usage(lab: Lab) -> None:
    done = lab.blktrack("top", "--once", "--interval", "0.1")
    assert (done.code, done.err) == (0, "")
    assert "no device is tracked; blktrack track DEVICE begins" in done.out
    assert lab.blktrack("top", "--once", "--json", "--interval", "0.1").json["devices"] == []
    device = lab.loop(MIB)
    done = lab.blktrack("top", device, "--once")
    assert done.code == 3 and f"{device} is not tracked" in done.err and "->" in done.err
    lab.track(device)
    lab.untrack(device)
    done = lab.blktrack("top", device, "--once")
    assert done.code == 3 and f"blktrack track {device}" in done.err
    for interval in ("0", "x", "nan"):
        done = lab.blktrack("top", "--interval", interval)
        assert done.code == 2 and "--interval" in done.err


@pytest.mark.parametrize("words", [["--json"], [], ["--plain"]], ids=["json", "piped", "plain"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_lines_until_a_signal(shared: Lab, words: list[str], number: signal.Signals) -> None:
    device = shared.loop(8 * MIB)
    shared.track(device)
    command = [sys.executable, "-m", "blktrack", "top", device, "--interval", "0.1", *words]
    process = subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        lines = [process.stdout.readline() for _ in range(6)]
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(30) == 128 + number
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert all(line.removesuffix("\n").isprintable() for line in [*lines, *rest.splitlines()])
    if "--json" in words:
        told: list[dict[str, Any]] = [json.loads(line) for line in lines]
        assert all(entry["devices"][0]["write_rate"] is not None for entry in told)
        assert [entry["time"] for entry in told] == sorted(entry["time"] for entry in told)
    else:
        assert sum(line.startswith(device) for line in lines) >= 2
        assert any("1 device  0 B/s" in line for line in lines)


def test_a_terminal_that_goes_without_a_signal(lab: Lab) -> None:
    """As it is for who is not led by it: with setsid, or from some supervisors."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "blktrack", "top", "--interval", "0.1"]
    process = subprocess.Popen(
        command,
        cwd=TOP,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    try:
        seen = b""
        while b"waiting for one" not in seen:
            seen += os.read(ours, 1 << 16)
        os.close(ours)
        _, complaint = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, complaint) == (128 + signal.SIGHUP, "")


def test_a_kernel_that_does_not_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(libbpf, "enable_stats", refuse)
    assert main(["top", "--once", "--interval", "0.1", "--cost"]) == 1
    told = capsys.readouterr().err
    assert "the kernel does not time programs" in told and "-> leave out --cost" in told


@pytest.mark.needs("tmux")
def test_on_a_real_terminal(lab: Lab) -> None:
    """Devices that come, are written to and vanish, seen by who looks at the screen."""
    file = lab.name("disk")
    device, other = lab.own_loop(8 * MIB, file), lab.loop(16 * MIB)
    lab.track(other)
    lab.untrack(other)
    env = {"BLKTRACK_ROOT": os.environ["BLKTRACK_ROOT"], "PYTHONPATH": str(TOP)}
    top = f"{sys.executable} -m blktrack top --interval 0.2"
    with Terminal(80, 24, env) as terminal:
        terminal.type(f"{top}; echo code $?")
        terminal.wait("no device is tracked; waiting for one")
        lab.track(device)
        terminal.wait("tracking")
        assert lab.blktrack("sync", device, lab.name("replica"), "--quiet").code == 0
        write_blocks(device, [0, 1, 2, 1000])
        terminal.wait(" 16 KiB")
        terminal.wait("● ready")
        assert all(len(line) <= 80 for line in terminal.screen())
        lab.track(other)
        terminal.wait("2 devices")
        terminal.keys("j")
        terminal.wait(f"▸ {max(device, other, key=len)}")
        terminal.resize(200, 40)
        terminal.wait("CONSISTENCY")
        terminal.wait("8 MiB by 4 KiB")
        assert any("crash" in line and "replica" in line for line in terminal.screen())
        terminal.keys("c")
        write_blocks(device, [5])
        terminal.wait("the kernel times each run")
        run("losetup", "--detach", device)
        terminal.wait("✖ absent")
        terminal.wait("no device with its identity is there")
        terminal.resize(80, 24)
        lab.untrack(other)
        terminal.wait("1 device, 1 absent")
        terminal.keys("q")
        terminal.wait("code 0")
        assert terminal.tell("alternate_on") == "0"
        run("losetup", device, file)
        for key, code in (("C-c", 130), ("", 143)):
            terminal.type(f"clear; {top}; echo code $?")
            terminal.wait("q quit")
            if key:
                terminal.keys(key)
            else:
                os.kill(terminal.child(), signal.SIGTERM)
            terminal.wait(f"code {code}")
            assert terminal.tell("alternate_on") == "0" and terminal.tell("cursor_flag") == "1"
        terminal.type(f"clear; TERM=dumb {top}")
        terminal.wait("1 gap")
        assert terminal.tell("alternate_on") == "0" and "q quit" not in terminal.text
        terminal.keys("C-c")
        terminal.wait(PROMPT.strip())


def test_devices_are_told_of_one_by_one(shared: Lab) -> None:
    """One whose record is damaged does not hide the others."""
    good, bad = shared.loop(8 * MIB), shared.loop(8 * MIB)
    shared.track(good)
    watch = shared.track(bad)
    record = shared.store.lib(watch.state.id) / "device.json"
    whole = record.read_bytes()
    with contextlib.closing(Live(shared.store)) as live:
        live.look()
        record.write_bytes(whole[:-20])
        try:
            report: TopReport = live.look()
        finally:
            record.write_bytes(whole)
        found = {entry.device: entry for entry in report.devices}
        assert found[good].state == "tracking"
        assert found[bad].state == "gap" and "is damaged" in found[bad].reason
