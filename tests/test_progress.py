"""What is told of an operation that is under way: when, how often, and how right it is."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack import durable, send, sync
from blktrack.capture import Source
from blktrack.cli.meter import Meter
from blktrack.cli.progress import Screen, Watcher
from blktrack.errors import Busy
from blktrack.extent import ExtentArray
from blktrack.observer import FREEZE
from blktrack.options import Options
from blktrack.rates import Rates
from blktrack.ship.limit import RateLimit
from blktrack.ship.receive import receive
from blktrack.tracker import service, tracker
from blktrack.tracker.tracking import Gap, Swap
from blktrack.units import GIB, KIB, MIB
from blktrack.verify import verify
from tests.blockdev import TOP, Lab, Silent, wait_until, write_direct
from tests.streams import Hosts
from tests.terminal import Terminal
from tests.test_sync import change

on_loop = pytest.mark.needs("root", "loop", "bpf")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Phases(Silent):
    """An observer that remembers phases."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.totals: list[int] = []
        self.most: list[int] = []  # done in each

    def phase(self, name: str, total: int) -> None:
        self.names.append(name)
        self.totals.append(total)
        self.most.append(0)

    def done(self, count: int) -> None:
        assert count >= self.most[-1], "a phase goes back"
        self.most[-1] = count


def go(clock: Clock, meter: Meter, rate: float, seconds: float, since: int = 0) -> int:
    """Let the meter see so many bytes per second for a while, ten times a second."""
    for step in range(1, round(seconds * 10) + 1):
        clock.now = round(clock.now + 0.1, 6)
        meter.done(since + round(rate * step / 10))
    return since + round(rate * seconds)


def test_rate_and_end_of_a_known_pace() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.phase("initial", 100 * MIB)
    for second in range(1, 100):
        go(clock, meter, MIB, 1, (second - 1) * MIB)
        reading = meter.reading()
        assert reading.count == second * MIB
        assert reading.rate == pytest.approx(MIB)
        assert reading.elapsed == pytest.approx(second)
        if second < 3:
            assert reading.left is None, "nothing is known yet"
        else:
            assert reading.left == pytest.approx(100 - second, abs=0.01)
    assert meter.reading().figures == "99 MiB of 100 MiB, 1 MiB/s, 1 s to go"


def test_another_pace_is_found_out() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.phase("initial", GIB)
    at = go(clock, meter, 20 * MIB, 30)
    go(clock, meter, MIB, 20, at)
    reading = meter.reading()
    assert reading.rate == pytest.approx(MIB, rel=0.01)
    assert reading.left == pytest.approx((GIB - at - 20 * MIB) / MIB, rel=0.01)


def test_what_stands_still_has_no_end() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.phase("verify", GIB)
    go(clock, meter, 20 * MIB, 10)
    clock.now += 20
    reading = meter.reading()
    assert (reading.rate, reading.left) == (0, None)
    assert reading.figures == "200 MiB of 1 GiB, 0 B/s"


def test_without_a_total_there_is_no_end() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.phase("recv", 0)
    go(clock, meter, MIB, 10)
    assert meter.reading().left is None
    assert meter.reading().figures == "10 MiB, 1 MiB/s"


def test_more_than_the_total_is_the_total() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.phase("incremental", 4 * MIB)
    go(clock, meter, MIB, 6)
    assert meter.reading().figures == "6 MiB of 6 MiB, 1 MiB/s, 0 s to go"


@pytest.mark.parametrize("limit", [100 * KIB, 5 * MIB, 300 * MIB])
def test_the_end_that_is_told_under_a_rate_limit_is_right(limit: int) -> None:
    """As a copy takes it: four threads, each of which asks before it reads."""
    clock = Clock()
    meter, bucket = Meter(clock=clock), RateLimit(Rates(limit), clock)
    piece, total = max(limit // 16, 4096), limit * 60
    meter.phase("initial", total)
    told: list[tuple[float, float]] = []
    done = 0
    while done < total:
        clock.now += bucket.take(piece)
        done += piece
        meter.done(min(done, total))
        if (left := meter.reading().left) is not None:
            told.append((clock.now, left))
    assert len(told) > 500
    wrong = [abs(now + left - clock.now) for now, left in told]
    assert max(wrong) <= 5, "of a minute"
    assert max(wrong[len(wrong) // 2 :]) <= 1


def test_a_new_phase_begins_from_nothing() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.phase("incremental", 40 * MIB)
    go(clock, meter, 10 * MIB, 4)
    meter.phase("apply", 40 * MIB)
    reading = meter.reading()
    assert (reading.phase, reading.count, reading.rate, reading.left) == ("apply", 0, None, None)
    assert reading.figures == "0 s so far"


class Log:
    """A screen on which time passes as it is told."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *labels: str, quiet: bool = False):
        self.clock, self._capsys = Clock(), capsys
        self.meters = [Meter(label, clock=self.clock) for label in labels or ("",)]
        self.meter = self.meters[0]
        self.screen = Screen(self.meters, quiet=quiet, clock=self.clock)

    def after(self, seconds: float, rate: float = 0, since: int = 0) -> list[str]:
        """The lines that come while time passes, each with its second."""
        found = []
        for second in range(1, round(seconds * 2) + 1):
            if rate:
                go(self.clock, self.meter, rate, 0.5, since + round(rate * (second - 1) / 2))
            else:
                self.clock.now += 0.5
            self.screen.tick()
            lines = self._capsys.readouterr().err.splitlines()
            assert all(len(line) < 100 and not CONTROL.search(line) for line in lines)
            found += [f"{second / 2:g} {line}" for line in lines]
        return found


def test_a_line_in_a_log_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(capsys)
    log.meter.phase("initial", 100 * MIB)
    assert log.after(35, MIB) == [
        "10 initial: 10 MiB of 100 MiB, 1 MiB/s, 1:30 to go",
        "20 initial: 20 MiB of 100 MiB, 1 MiB/s, 1:20 to go",
        "30 initial: 30 MiB of 100 MiB, 1 MiB/s, 1:10 to go",
    ]


def test_a_phase_of_over_two_seconds_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(capsys)
    log.meter.phase("incremental", 0)
    assert log.after(9.5) == [], "what is over soon has none"
    assert log.after(0.5) == ["0.5 incremental: 10 s so far"]
    log.meter.phase("pre hook 'sync'", 0)
    assert log.after(1.5) == []
    log.meter.phase("waiting for device /dev/sdb, which another run holds", 0)
    assert log.after(4) == [
        "2 waiting for device /dev/sdb, which another run holds: 2 s so far",
    ]
    log.meter.phase("round 2: 4 MiB changed meanwhile", 4 * MIB)
    assert log.after(3, MIB) == [
        "2 round 2: 4 MiB changed meanwhile: 2 MiB of 4 MiB, 1 MiB/s",
    ]


def test_several_at_once_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(capsys, "sdb", "sdc")
    log.meters[1].phase("resync", 8 * MIB)
    log.clock.now += 1
    log.meters[0].phase("initial", 8 * MIB)
    assert log.after(10) == ["9 sdb: initial: 9 s so far", "9 sdc: resync: 10 s so far"]


def test_quiet_tells_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(capsys, quiet=True)
    log.meter.phase("initial", 100 * MIB)
    log.meter.warn("something is amiss")
    assert log.after(30, MIB) == ["0.5 blktrack: warning: something is amiss"]


def test_nothing_is_written_under_a_freeze(capsys: pytest.CaptureFixture[str]) -> None:
    """Not even of another operation: it may be the log of both that is frozen."""
    log = Log(capsys, "sdb", "sdc")
    log.meters[1].phase("initial", 100 * MIB)
    log.meter.phase(FREEZE, 0)
    log.meters[1].warn("something is amiss")
    assert log.after(30) == []
    log.meter.phase("thawed", 0)
    assert log.after(0.5) == [
        "0.5 blktrack: warning: something is amiss",
        "0.5 sdb: thawed: 0 s so far",
        "0.5 sdc: initial: 30 s so far",
    ]


def test_a_freeze_waits_for_a_line_that_is_being_written() -> None:
    watcher, frozen = Watcher(quiet=True), threading.Event()

    def freeze() -> None:
        watcher.phase(FREEZE, 0)
        frozen.set()

    with watcher, watcher.screen.gate:
        thread = threading.Thread(target=freeze)
        thread.start()
        assert not frozen.wait(0.05)
        assert not watcher.reading().hushed
    thread.join()
    assert frozen.is_set() and watcher.reading().hushed


def test_warnings_that_are_left_come_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Watcher(quiet=True) as watcher:
        watcher.phase(FREEZE, 0)
        watcher.warn("the post hook failed")
    assert capsys.readouterr().err == "blktrack: warning: the post hook failed\n"


def test_without_rich_a_terminal_has_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)
    log = Log(capsys)
    log.meter.phase("recv", 0)
    assert log.after(12, MIB) == ["10 recv: 10 MiB, 1 MiB/s"]


# What the process on the terminal does: a line of input ends each step.
_STEPS = """
import sys
from blktrack.cli.progress import Watcher
from blktrack.observer import FREEZE
from blktrack.units import MIB
with Watcher(quiet="--quiet" in sys.argv) as watcher:
    watcher.phase("initial", 4 * MIB)
    watcher.done(MIB)
    input()
    watcher.phase("round 2: 1.5 MiB of [bold]markup[/bold] and of much more changed meanwhile", 0)
    input()
    watcher.warn("mind this")
    input()
print("the end")
"""


def plain(screen: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_bar_on_a_terminal(columns: int) -> None:
    env = {"PYTHONPATH": str(TOP)}
    with Terminal([sys.executable, "-c", _STEPS], columns=columns, env=env) as terminal:

        def until(text: str) -> None:
            def shown() -> bool:
                terminal.read()
                return text in plain(terminal.screen)

            wait_until(shown, f"{text!r} on {terminal.screen!r}")

        until("1 MiB of 4 MiB")
        assert "initial" in plain(terminal.screen) and "━" in terminal.screen
        terminal.send("\n")
        until("round 2: 1.5 M")
        until("s so far")
        if columns == 200:
            until("[bold]markup[/bold]")
        terminal.send("\n")
        until("blktrack: warning: mind this")
        terminal.send("\n")
        assert terminal.end() == 0
    lines = re.split(r"[\r\n]+", plain(terminal.screen))
    assert max(map(len, lines)) <= columns
    # The bar is gone: what it leaves is an empty line.
    assert terminal.screen.rstrip().endswith("the end")
    assert re.search(r"\x1b\[2K(\x1b\[\?25h)?\s*the end", terminal.screen) or (
        "\x1b[2K" in terminal.screen.rpartition("mind this")[2]
    )


def test_quiet_on_a_terminal() -> None:
    env = {"PYTHONPATH": str(TOP)}
    with Terminal([sys.executable, "-c", _STEPS, "--quiet"], env=env) as terminal:
        terminal.send("\n\n\n")
        assert terminal.end() == 0
    assert terminal.screen.split() == ["blktrack:", "warning:", "mind", "this", "the", "end"]


def test_a_lock_that_another_run_holds_is_told(tmp_path: Path) -> None:
    told, free = Phases(), threading.Event()
    path = tmp_path / "lock"

    def hold() -> None:
        with durable.lock(path, what="device /dev/sdb"):
            held.set()
            free.wait(30)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    with pytest.raises(Busy), durable.lock(path, what="device /dev/sdb", observer=told):
        raise AssertionError
    assert told.names == [], "who does not wait need not say so"
    told.phase = lambda name, total: (told.names.append(name), free.set())  # type: ignore[assignment,method-assign,func-returns-value]
    with durable.lock(path, what="device /dev/sdb", wait=30, observer=told):
        pass
    assert told.names == ["waiting for device /dev/sdb, which another run holds"]
    holder.join()


@on_loop
def test_the_phases_of_a_sync_in_their_order(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    device, replica = shared.loop(16 * MIB), shared.name("replica")
    tracked = Phases()
    tracker.track(shared.store, device, None, tracked)
    assert tracked.names == [f"attaching the tracking programs to {device}"]

    def brought(meanwhile: Callable[[int], None] | None = None) -> Phases:
        told, judge, turn = Phases(), Source.is_valid, iter(range(1, 100))

        def valid(source: Source, swap: Swap, extents: ExtentArray) -> bool:
            if meanwhile is not None:
                meanwhile(next(turn))
            return judge(source, swap, extents)

        with monkeypatch.context() as patch:
            patch.setattr(Source, "is_valid", valid)
            sync.sync(shared.store, device, str(replica), Options(), told)
        assert all(most <= total for most, total in zip(told.most, told.totals, strict=True))
        return told

    first = brought()
    assert first.names == ["initial", "writing back what was copied"]
    assert first.totals[0] == first.most[0] == 16 * MIB

    change(device, MIB)

    def again(turn: int) -> None:
        if turn < 3:
            write_direct(device, MIB, bytes([turn]) * 16 * KIB)

    second = brought(again)
    assert second.names == [
        "incremental",
        "round 2: 16 KiB changed meanwhile",
        "round 3: 16 KiB changed meanwhile",
        "writing back what was copied",
        "apply",
    ]
    assert second.totals == [64 * KIB, 16 * KIB, 16 * KIB, 0, 64 * KIB]
    assert second.most == second.totals

    change(device, 2 * MIB, number=2)

    def gap(turn: int) -> None:
        if turn == 1:
            raise Gap(f"{device}: a mark was lost")

    third = brought(gap)
    assert third.names[:2] == [
        "incremental",
        f"once more, from a new beginning: {device}: a mark was lost",
    ]
    assert third.names[-2:] == ["writing back what was copied", "apply"]


@on_loop
def test_a_doubt_and_what_an_earlier_run_left(shared: Lab) -> None:
    device, replica = shared.loop(16 * MIB), shared.name("replica")
    tracker.track(shared.store, device, None)
    shared.sync(device, replica)
    change(device, MIB)
    shared.blktrack("sync", device, replica, env={"BLKTRACK_CRASH": "stage-sealed"})
    told = Phases()
    verify(shared.store, device, str(replica), Options(), told)
    assert told.names == ["applying the increment of an earlier run", "verify"]
    assert told.totals == told.most == [64 * KIB, 16 * MIB]

    (state,) = [state for state in shared.store.devices() if state.path == device]
    state.boot_id = "another"
    shared.store.save_device(state)
    told = Phases()
    sync.sync(shared.store, device, str(replica), Options(), told)
    assert told.names == [
        f"tracking begins anew: {device}: the host was rebooted without blktrack stop",
        f"attaching the tracking programs to {device}",
        "resync",
        "writing back what was copied",
    ]


@on_loop
def test_the_phases_of_streams_and_hooks(shared: Lab) -> None:
    hosts = Hosts(shared, 16 * MIB)

    def carry(options: Options) -> tuple[Phases, Phases]:
        sent, received, file = Phases(), Phases(), io.BytesIO()
        send.send(shared.store, hosts.source, hosts.link, file, options=options, observer=sent)
        file.seek(0)
        received.phase("recv", len(file.getbuffer()))
        report = receive(file, str(hosts.target), hosts.paths, observer=received)
        send.commit(shared.store, hosts.source, hosts.link, report.epoch)
        return sent, received

    sent, received = carry(Options())
    assert sent.names == ["initial"] and sent.most == [16 * MIB]
    assert received.names == ["recv", "writing back what was received"]
    hosts.change(MIB)
    # Nothing is mounted: the hooks run, and nothing is frozen.
    sent, received = carry(Options(consistency="filesystem", pre=("true",), post=("true",)))
    assert sent.names == ["incremental", "pre hook 'true'", "post hook 'true'", "thawed"]
    assert received.names == ["recv", "writing back what was received", "apply"]
    assert received.most[0] > 64 * KIB and received.most[2] == received.totals[2] == 64 * KIB


@on_loop
def test_the_phases_of_a_rest(shared: Lab) -> None:
    device, stopped, started = shared.loop(16 * MIB), Phases(), Phases()
    tracker.track(shared.store, device, None)
    assert service.stop(shared.store, device, stopped)[0].action == "stopped"
    assert stopped.names == [f"putting {device} to rest"]
    assert service.start(shared.store, device, started)[0].action == "resumed"
    assert started.names == [f"tracking {device} on"]


@on_loop
def test_a_log_of_a_sync_has_lines_and_no_control_characters(lab: Lab) -> None:
    device, replica, log = lab.loop(16 * MIB), lab.name("replica"), lab.name("log")
    lab.track(device)
    with log.open("w") as file:
        words = [sys.executable, "-m", "blktrack", "sync", device, str(replica), "--limit", "1M"]
        running = subprocess.Popen(words, stderr=file, cwd=TOP)
        lab.stack.callback(running.wait)
        lab.stack.callback(running.kill)
        wait_until(lambda: "initial: " in log.read_text(), "a line")
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    text = log.read_text()
    assert re.match(r"initial: [\d.]+ [KM]iB of 16 MiB, [\d.]+ [KM]iB/s", text)
    assert not CONTROL.search(text)


@on_loop
def test_a_sync_on_a_terminal(lab: Lab) -> None:
    device, replica = lab.loop(64 * MIB), lab.name("replica")
    lab.track(device)
    words = [sys.executable, "-m", "blktrack", "sync", device, str(replica), "--limit", "1M"]
    with Terminal(words, env={"PYTHONPATH": str(TOP)}) as terminal:
        terminal.until(" of 64 MiB")
        terminal.until(" to go")
        terminal.send("\x03")
        assert terminal.end() == 130
    last = plain(terminal.screen).rpartition("blktrack: ")
    assert "was interrupted" in last[2] and "->" in last[2]
