"""Freezes of real file systems under load, and every way in which one can end."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blktrack import linux, sysfs
from blktrack.errors import BlktrackError, NoPoint, Refused
from blktrack.quiesce import find, watchdog
from blktrack.quiesce.find import FileSystem, file_systems
from blktrack.quiesce.freeze import Freeze, FreezeExpired
from blktrack.sysfs import BlockDevice
from blktrack.units import KIB, MIB
from tests.blockdev import TOP, Lab, run, told, wait_until
from tests.test_sysfs import Tree
from tests.workload import make_filesystem

pytestmark = pytest.mark.needs("root", "loop", "ext4")
KINDS = [pytest.param(kind, marks=pytest.mark.needs(kind)) for kind in ("ext4", "xfs")]
SIZE = 320 * MIB  # mkfs.xfs makes none below 300 MiB
SLACK = 1.5  # seconds that a busy machine may be late


def let_go(point: Path) -> None:
    """The safety net: no test leaves a file system frozen, whatever it did."""
    fd = os.open(point, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            linux.thaw(fd)
    finally:
        os.close(fd)


def mount(lab: Lab, device: str, *options: str) -> Path:
    """Until the end of the test."""
    point = lab.stack.enter_context(lab.mounted(device, *options))
    lab.stack.callback(wait_until, lambda: not in_use(point), f"the end of the guards of {point}")
    lab.stack.callback(let_go, point)
    return point


def in_use(point: Path) -> bool:
    """Whether a process has it open: the guard of a process that was killed, for a moment."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if any(os.readlink(entry) == str(point) for entry in os.scandir(process / "fd")):
                return True
    return False


class Mounted:
    """A loop device with a file system on it, mounted until the end of the test."""

    def __init__(self, lab: Lab, kind: str = "ext4", device: str = "") -> None:
        self.path = device or lab.loop(SIZE)
        make_filesystem(self.path, kind)
        self.point = mount(lab, self.path)
        self.device = BlockDevice.find(self.path)

    def freeze(self, **options: Any) -> Freeze:
        return Freeze(self.device, functools.partial(file_systems, self.device), **options)

    @property
    def writes(self) -> int:
        """Begun by the device, as the block layer counts (Documentation/block/stat)."""
        fields = (self.device.sys / "stat").read_text(encoding="ascii").split()
        return int(fields[4]) + int(fields[8])

    @contextlib.contextmanager
    def frozen_by_another(self) -> Iterator[Callable[[], None]]:
        fd = os.open(self.point, os.O_RDONLY)
        linux.freeze(fd)
        try:
            yield lambda: linux.thaw(fd)
        finally:
            with contextlib.suppress(OSError):
                linux.thaw(fd)
            os.close(fd)


@pytest.fixture
def ext4(lab: Lab) -> Mounted:
    return Mounted(lab)


class Load:
    """Threads that write into a folder as fast as they can, with and without flushing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=[n]) for n in range(2)]

    def _write(self, number: int) -> None:
        data = os.urandom(64 * KIB)
        with (self.folder / f"load{number}").open("wb", buffering=0) as file:
            turn = 0
            while not self._stop.is_set():
                os.pwrite(file.fileno(), data, (turn * 37 % 512) * len(data))
                if number:
                    os.fdatasync(file.fileno())
                turn += 1
                self.done += 1

    def goes_on(self) -> None:
        before = self.done
        wait_until(lambda: self.done > before + 10, "a write")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
            if thread.is_alive():
                let_go(self.folder)
                thread.join()


def is_frozen(point: Path) -> bool:
    fd = os.open(point, os.O_RDONLY)
    try:
        linux.freeze(fd)
    except OSError as error:
        assert error.errno == errno.EBUSY
        return True
    else:
        linux.thaw(fd)
        return False
    finally:
        os.close(fd)


def assert_thawed(mounted: Mounted) -> None:
    """And nobody is about to freeze it again."""
    fd = os.open(mounted.point, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            linux.thaw(fd)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EINVAL


def not_entered(freeze: Freeze, error: type[BlktrackError], match: str) -> BlktrackError:
    with pytest.raises(error, match=match) as caught, freeze:
        pytest.fail("entered")
    assert caught.value.hint
    return caught.value


# What a freeze is


@pytest.mark.parametrize("kind", KINDS)
def test_writers_stand_still(lab: Lab, kind: str) -> None:
    mounted = Mounted(lab, kind)
    copy = lab.name("copy")
    with Load(mounted.point) as load:
        began = time.monotonic()
        with mounted.freeze(cap=20) as freeze:
            before, done = mounted.writes, load.done
            run("cp", "--sparse=always", mounted.path, copy)
            time.sleep(0.3)
            assert mounted.writes == before
            assert load.done - done <= 2  # what returned just as the freeze did
            inside = freeze.seconds
        assert 0.3 < inside < freeze.seconds < time.monotonic() - began
        load.goes_on()
    assert mounted.writes > before
    assert_thawed(mounted)
    if kind == "ext4":
        run("e2fsck", "-fn", copy)  # with no journal to replay
    else:
        device = lab.loop(SIZE, file=copy)
        with lab.mounted(device, "-o", "nouuid"):  # its log keeps the counters
            pass
        run("xfs_repair", "-n", device)


@pytest.mark.parametrize("kind", KINDS)
def test_how_long_it_takes(lab: Lab, kind: str) -> None:
    mounted = Mounted(lab, kind)
    took = []
    with Load(mounted.point) as load:
        for _ in range(10):
            with mounted.freeze() as freeze:
                pass
            took.append(1000 * freeze.seconds)
            load.goes_on()
    told(
        f"freeze of {kind} under load, nothing done in it: {min(took):.1f} to {max(took):.1f} ms,"
        f" median {sorted(took)[len(took) // 2]:.1f} ms"
    )


def test_without_file_systems_only_hooks_run(lab: Lab) -> None:
    device = BlockDevice.find(lab.loop(MIB))
    log = lab.name("log")
    with Freeze(
        device, functools.partial(file_systems, device), pre=[f"echo pre >> {log}"]
    ) as freeze:
        assert log.read_text() == "pre\n"
    assert freeze.seconds == 0


def test_the_flush_comes_first(ext4: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noted(name: str) -> None:
        call = getattr(linux, name)

        def note(fd: int) -> None:
            calls.append(name)
            call(fd)

        monkeypatch.setattr(linux, name, note)

    noted("sync_filesystem")
    noted("freeze")
    (ext4.point / "file").write_bytes(bytes(MIB))
    with ext4.freeze():
        pass
    assert calls[0] == "sync_filesystem" and calls[-1] == "freeze"
    assert calls.count("freeze") == 1


# Ways out


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_of_the_body_thaws(ext4: Mounted, error: type[BaseException]) -> None:
    with pytest.raises(error), ext4.freeze():
        raise error
    assert_thawed(ext4)


def expired(freeze: Freeze) -> bool:
    try:
        freeze.check()
    except FreezeExpired:
        return True
    return False


def test_the_cap(ext4: Mounted) -> None:
    with (
        Load(ext4.point) as load,
        pytest.raises(FreezeExpired, match=r"0\.4 s") as caught,
        ext4.freeze(cap=0.4) as freeze,
    ):
        freeze.check()
        load.goes_on()
        wait_until(functools.partial(expired, freeze), "word of it")
    assert caught.value.exit_code == 4 and caught.value.hint
    assert 0.4 <= freeze.seconds < 0.4 + SLACK
    told(f"freeze with a cap of 400 ms: ended after {1000 * freeze.seconds:.1f} ms")
    assert_thawed(ext4)


def test_the_error_of_the_body_goes_before_the_cap(ext4: Mounted) -> None:
    with pytest.raises(RuntimeError), ext4.freeze(cap=0.1):
        wait_until(lambda: (ext4.point / "file").write_bytes(b"x") == 1, "a write")
        raise RuntimeError


def test_somebody_else_thaws(ext4: Mounted) -> None:
    with pytest.raises(FreezeExpired, match="somebody else thawed it"), ext4.freeze():
        let_go(ext4.point)
    assert_thawed(ext4)


CHILD = """
import functools, sys, time
from blktrack.quiesce.find import file_systems
from blktrack.quiesce.freeze import Freeze
from blktrack.sysfs import BlockDevice
device = BlockDevice.find(sys.argv[1])
while True:
    with Freeze(device, functools.partial(file_systems, device), cap=float(sys.argv[2])):
        print("frozen", flush=True)
        time.sleep(float(sys.argv[3]))
"""


@contextlib.contextmanager
def freezing(
    mounted: Mounted, cap: float, hold: float, script: str = CHILD
) -> Iterator[subprocess.Popen[str]]:
    """Another process that freezes again and again; it has frozen at least once."""
    words = [sys.executable, "-c", script, mounted.path, str(cap), str(hold)]
    process = subprocess.Popen(
        words,
        cwd=TOP,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "frozen\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_thaws(lab: Lab, kind: str, number: signal.Signals) -> None:
    mounted = Mounted(lab, kind)
    with Load(mounted.point) as load, freezing(mounted, 60, 60) as process:
        os.killpg(process.pid, number)
        began = time.monotonic()
        load.goes_on()
        took = time.monotonic() - began
        assert took < SLACK
        process.wait(10)
    told(f"{kind} thawed {1000 * took:.1f} ms after {number.name} to who froze it")
    assert_thawed(mounted)


def test_a_stopped_process_thaws_at_the_cap(ext4: Mounted) -> None:
    with Load(ext4.point) as load, freezing(ext4, 0.5, 60) as process:
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        load.goes_on()
        assert time.monotonic() - began < 0.5 + SLACK


STOPPING = f"""
import os, signal
from blktrack.quiesce.watchdog import Watchdog
tell, told = Watchdog._tell, []
def stop(self, word, index):
    told.append(word)
    if told.count(b"f") == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    tell(self, word, index)
Watchdog._tell = stop
{CHILD}"""


def test_a_process_stopped_before_it_can_say_that_it_froze(ext4: Mounted) -> None:
    with Load(ext4.point) as load, freezing(ext4, 0.5, 0, STOPPING) as process:
        wait_until(lambda: is_stopped(process.pid), "the second freeze")
        began = time.monotonic()
        load.goes_on()
        assert time.monotonic() - began < 0.5 + SLACK
    assert_thawed(ext4)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_death_at_any_moment_thaws(ext4: Mounted) -> None:
    with Load(ext4.point) as load:
        for turn in range(12):
            with freezing(ext4, 60, 0) as process:
                time.sleep(turn * 0.012)
            assert process.returncode == -signal.SIGKILL
            began = time.monotonic()
            load.goes_on()
            assert time.monotonic() - began < SLACK
    assert_thawed(ext4)


CAREFUL = f"""
try:
{textwrap.indent(CHILD, "    ")}
except KeyboardInterrupt:
    time.sleep(600)
"""


def childless(pid: int) -> bool:
    """But for those that have ended and were not waited for."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return not any(alive(int(child)) for child in children)


def test_an_interrupt_at_any_moment_thaws(ext4: Mounted) -> None:
    with Load(ext4.point) as load:
        for turn in range(12):
            with freezing(ext4, 60, 0, CAREFUL) as process:
                time.sleep(turn * 0.012)
                process.send_signal(signal.SIGINT)
                load.goes_on()
                wait_until(functools.partial(childless, process.pid), "the end of the guard")
                assert process.poll() is None
                assert_thawed(ext4)


def guard_of(freeze: Freeze) -> int:
    assert freeze._watchdog and freeze._watchdog._process
    return freeze._watchdog._process.pid


def test_the_guard_is_killed(ext4: Mounted) -> None:
    with (
        Load(ext4.point) as load,
        pytest.raises(FreezeExpired, match="guards it was killed"),
        ext4.freeze(cap=60) as freeze,
    ):
        os.kill(guard_of(freeze), signal.SIGKILL)
        load.goes_on()
    assert freeze.seconds < SLACK
    assert_thawed(ext4)


def test_the_guard_is_killed_at_the_end(ext4: Mounted) -> None:
    for _ in range(10):
        with pytest.raises(FreezeExpired), ext4.freeze(cap=60) as freeze:
            os.kill(guard_of(freeze), signal.SIGKILL)
        assert_thawed(ext4)


def test_the_guard_is_killed_at_any_moment(ext4: Mounted) -> None:
    ended = []
    with Load(ext4.point):
        for turn in range(20):
            freeze = ext4.freeze(cap=60)
            killer = threading.Thread(target=kill_guard, args=[freeze, turn * 0.015])
            killer.start()
            try:
                with freeze:
                    time.sleep(0.02)
                ended.append("held")
            except BlktrackError as error:
                ended.append("lost" if isinstance(error, FreezeExpired) else "not begun")
            killer.join()
            assert_thawed(ext4)
    assert "lost" in ended
    ways = ", ".join(f"{ended.count(way)} {way}" for way in sorted(set(ended)))
    told(f"freezes whose guard was killed at some moment: {ways}")


def kill_guard(freeze: Freeze, delay: float) -> None:
    wait_until(lambda: bool(freeze._watchdog and freeze._watchdog._process), "a guard")
    time.sleep(delay)
    assert freeze._watchdog and freeze._watchdog._process
    freeze._watchdog._process.kill()


def test_the_guard_is_stopped(ext4: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FreezeExpired), ext4.freeze() as freeze:
        monkeypatch.setattr(watchdog, "_PATIENCE", 0.3)
        os.kill(guard_of(freeze), signal.SIGSTOP)
    assert_thawed(ext4)


def test_the_guard_cannot_be_asked_to_end(ext4: Mounted) -> None:
    with ext4.freeze() as freeze:
        guard = guard_of(freeze)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(guard, number)
        assert os.getsid(guard) == guard
        locked = Path(f"/proc/{guard}/status").read_text()
        assert "VmLck:\t       0 kB" not in locked
        freeze.check()
    assert_thawed(ext4)


def test_the_guard_does_not_start(ext4: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_PROGRAM", Path("/nowhere"))
    not_entered(ext4.freeze(), BlktrackError, "did not start")
    assert_thawed(ext4)


# Frozen by somebody else


def test_waits_for_another_freeze(ext4: Mounted) -> None:
    with ext4.frozen_by_another() as thaw:
        later = threading.Timer(0.3, thaw)
        later.start()
        with ext4.freeze() as freeze:
            later.join()
        assert freeze.seconds < SLACK


def test_gives_up_waiting_for_another_freeze(lab: Lab, ext4: Mounted) -> None:
    first = Mounted(lab)
    both = [*file_systems(ext4.device), *file_systems(first.device)]
    with ext4.frozen_by_another() as thaw:
        not_entered(Freeze(ext4.device, lambda: both, cap=0.3), NoPoint, "frozen by somebody else")
        thaw()  # it still was
    for one in (ext4, first):
        assert_thawed(one)


# Several file systems


@pytest.fixture
def nested(lab: Lab, ext4: Mounted) -> Mounted:
    """A file system in a file of another."""
    file = ext4.point / "disk"
    return Mounted(lab, device=lab.loop(128 * MIB, file=file))


def test_one_in_a_file_of_another(ext4: Mounted, nested: Mounted) -> None:
    # To a source it is data of the outer one, and not its own.
    assert [one.points for one in file_systems(ext4.device)] == [(ext4.point,)]
    both = [*file_systems(ext4.device), *file_systems(nested.device)]
    with Load(nested.point) as load:
        with Freeze(ext4.device, lambda: both):
            before = ext4.writes
            time.sleep(0.1)
            assert ext4.writes == before
        load.goes_on()


def test_the_wrong_order_ends_at_the_cap(ext4: Mounted, nested: Mounted) -> None:
    both = [*file_systems(nested.device), *file_systems(ext4.device)]
    freeze = Freeze(ext4.device, lambda: both, cap=0.5)
    with Load(nested.point) as load:
        not_entered(freeze, FreezeExpired, r"longer than the 0\.5 s")
        load.goes_on()
    assert freeze.seconds < 0.5 + SLACK
    for one in (ext4, nested):
        assert_thawed(one)


def test_one_that_cannot_be_frozen(lab: Lab, ext4: Mounted) -> None:
    point = lab.stack.enter_context(lab.mounted("tmpfs", "-t", "tmpfs"))
    (found,) = [m for m in sysfs.mounts() if m.point == point]
    memory = FileSystem(found.number, "tmpfs", (point,), frozenset())

    def both() -> list[FileSystem]:
        return [memory, *file_systems(ext4.device)]

    freeze = Freeze(ext4.device, both)
    error = not_entered(freeze, Refused, r"tmpfs .* cannot be frozen: Operation not supported")
    assert f"remount,ro {point}'" in error.hint
    assert_thawed(ext4)
    with Load(ext4.point), Freeze(ext4.device, both, lenient=True) as freeze:
        assert freeze.unfrozen == [memory]
        before = ext4.writes
        time.sleep(0.1)
        assert ext4.writes == before
    assert freeze.seconds > 0.1
    assert_thawed(ext4)
    with Freeze(ext4.device, lambda: [memory], lenient=True) as freeze:
        (point / "file").write_text("x")
    assert freeze.seconds == 0


# Mounted meanwhile


class Mounting:
    """Lists the file systems of a disk with two partitions, and mounts one of them after some."""

    def __init__(self, lab: Lab, at: Sequence[int]) -> None:
        disk = lab.loop(2 * SIZE)
        self.parts = [lab.partition(disk, n, (n - 1) * SIZE, SIZE) for n in (1, 2)]
        for part in self.parts:
            make_filesystem(part, "ext4")
        self.first = mount(lab, self.parts[0])
        self.lab, self.at, self.device = lab, at, BlockDevice.find(disk)
        self.listings = 0
        self.other = lab.name("mount")
        self.other.mkdir()

    def __call__(self) -> list[FileSystem]:
        found = file_systems(self.device)
        self.listings += 1
        if self.listings in self.at:
            self.mount()
        return found

    def mount(self) -> None:
        run("mount", self.parts[1], self.other)
        self.lab.stack.callback(run, "umount", self.other)

    def assert_thawed(self) -> None:
        assert not is_frozen(self.first) and not is_frozen(self.other)


def test_a_mount_by_a_pre_hook(lab: Lab) -> None:
    disk = Mounting(lab, at=())
    pre = [f"mount {disk.parts[1]} {disk.other}"]
    with Freeze(disk.device, disk, pre=pre, post=[f"umount {disk.other}"]) as freeze:
        assert {one.points[0] for one in freeze.file_systems} == {disk.first, disk.other}
        assert is_frozen(disk.first) and is_frozen(disk.other)
    assert freeze.warnings == []
    (left,) = file_systems(disk.device)
    assert left.points == (disk.first,)


def test_a_mount_after_the_listing(lab: Lab) -> None:
    """It is found once the first is frozen, and then both are."""
    disk = Mounting(lab, at=[1])
    log = lab.name("log")
    with Freeze(disk.device, disk, post=[f"echo post >> {log}"]) as freeze:
        assert {one.points[0] for one in freeze.file_systems} == {disk.first, disk.other}
        assert is_frozen(disk.first) and is_frozen(disk.other)
        assert not log.exists()
    assert disk.listings == 5  # before and under the first freeze and the second, and after
    assert log.read_text() == "post\n"
    disk.assert_thawed()


def test_mounts_without_end(lab: Lab) -> None:
    disk = Mounting(lab, at=())
    disk.mount()

    def listing() -> list[FileSystem]:
        """As if it were unmounted under each freeze, and mounted again before the next."""
        found = disk()
        return (
            found if disk.listings % 2 == 0 else [one for one in found if disk.first in one.points]
        )

    freeze = Freeze(disk.device, listing)
    not_entered(freeze, NoPoint, f"not frozen: the ext4 at {disk.other}")
    assert disk.listings == 4
    disk.assert_thawed()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_mount_under_the_freeze(lab: Lab, frozen: bool) -> None:
    """Where nothing was mounted, and so nothing frozen, too."""
    disk = Mounting(lab, at=())
    log = lab.name("log")
    with contextlib.ExitStack() as stack:
        if not frozen:
            device = BlockDevice.find(disk.parts[1])
            freeze = Freeze(device, functools.partial(file_systems, device))
        else:
            freeze = Freeze(disk.device, disk, post=[f"echo post >> {log}"])
        stack.enter_context(pytest.raises(NoPoint, match=f"the ext4 at {disk.other}"))
        stack.enter_context(freeze)
        disk.mount()
    assert log.exists() == frozen
    disk.assert_thawed()


# What is written to meanwhile


def test_state_on_what_would_be_frozen(lab: Lab, ext4: Mounted, nested: Mounted) -> None:
    overlay, upper, work = lab.name("overlay"), ext4.point / "upper", ext4.point / "work"
    for folder in (overlay, upper, work):
        folder.mkdir()
    layers = f"lowerdir={lab.folder},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "-o", layers, "none", overlay)
    lab.stack.callback(run, "umount", overlay)
    within = [ext4.point, ext4.point / "not/yet", nested.point, Path(nested.path), overlay]
    for path in within:
        freeze = ext4.freeze(must_write=[lab.folder, path])
        not_entered(freeze, Refused, "which is written to")
    other = Mounted(lab)
    with ext4.freeze(must_write=[lab.folder, other.point, Path(other.path)]):
        pass


# Which file systems


def test_disk_and_partitions(lab: Lab) -> None:
    disk = lab.loop(2 * SIZE)
    parts = [Mounted(lab, device=lab.partition(disk, n, (n - 1) * SIZE, SIZE)) for n in (1, 2)]
    for part in parts:
        (found,) = file_systems(part.device)
        assert (found.kind, found.points) == ("ext4", (part.point,))
    whole = BlockDevice.find(disk)
    listing = functools.partial(file_systems, whole)
    assert [one.points[0] for one in file_systems(whole)] == [part.point for part in parts]
    with Load(parts[0].point), Load(parts[1].point), Freeze(whole, listing):
        before = [part.writes for part in parts]
        time.sleep(0.1)
        assert [part.writes for part in parts] == before
    for part in parts:
        assert_thawed(part)


def test_a_loop_device_on_the_device(lab: Lab) -> None:
    lower = lab.loop(SIZE)
    upper = Mounted(lab, device=lab.loop(SIZE, file=Path(lower)))
    (found,) = file_systems(BlockDevice.find(lower))
    assert found.points == (upper.point,)


def test_two_mounts_of_one(lab: Lab, ext4: Mounted) -> None:
    second = mount(lab, ext4.path)
    (found,) = file_systems(ext4.device)
    assert found.points == (ext4.point, second)
    with lab.mounted("tmpfs", "-t", "tmpfs"):
        run("mount", "-t", "tmpfs", "tmpfs", ext4.point)
        lab.stack.callback(run, "umount", ext4.point)
        with ext4.freeze():
            before = ext4.writes
        run("mount", "-t", "tmpfs", "tmpfs", second)
        lab.stack.callback(run, "umount", second)
        not_entered(ext4.freeze(), Refused, "cannot be reached")
    assert ext4.writes >= before


def test_read_only(lab: Lab) -> None:
    path = lab.loop(SIZE)
    make_filesystem(path, "ext4")
    device = BlockDevice.find(path)
    assert file_systems(device) == []
    with lab.mounted(path, "-o", "ro"):
        assert file_systems(device) == []
    with lab.mounted(path) as point:
        # The mount is, the file system is not.
        run("mount", "-o", "remount,bind,ro", point)
        assert [one.points for one in file_systems(device)] == [(point,)]
        with Freeze(device, functools.partial(file_systems, device)) as freeze:
            pass
        assert freeze.seconds > 0


def test_mounted_in_another_namespace(lab: Lab) -> None:
    path, point = lab.loop(SIZE), lab.name("mount")
    point.mkdir()
    make_filesystem(path, "ext4")
    device = BlockDevice.find(path)
    script = f"mount {path} {point} && echo mounted && read end"
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout and other.stdout.readline() == "mounted\n"
        with pytest.raises(Refused, match=f"process {other.pid}, at {point}"):
            file_systems(device)
        with lab.mounted(path) as here:
            assert [one.points for one in file_systems(device)] == [(here,)]
    finally:
        other.communicate("\n")
    wait_until(lambda: not find._in_use_by(device), "the end of the other mount")
    assert file_systems(device) == []


def test_mounted_nowhere_to_be_seen(lab: Lab) -> None:
    path = lab.loop(SIZE)
    make_filesystem(path, "ext4")
    device = BlockDevice.find(path)
    point = lab.name("mount")
    point.mkdir()
    run("mount", path, point)
    with (point / "file").open("wb"):
        run("umount", "--lazy", point)
        with pytest.raises(Refused, match="no process shows it"):
            file_systems(device)
    wait_until(lambda: not find._in_use_by(device), "the end of the mount")
    assert file_systems(device) == []


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A made-up sysfs and procfs, for devices that not every machine has."""
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/mnt").touch()
    (tmp_path / "proc/self/root").symlink_to("/")
    monkeypatch.setattr(sysfs, "SYSFS", tmp_path)
    monkeypatch.setattr(find, "SYSFS", tmp_path)
    monkeypatch.setattr(find, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(sysfs, "MOUNTINFO", tmp_path / "mountinfo")
    (tmp_path / "class/block").mkdir(parents=True)
    return Tree(tmp_path)


def test_a_volume_on_a_partition(tree: Tree) -> None:
    disk = tree.disk("sda", "8:0", 4096)
    part = tree.partition(disk, "sda1", "8:1", 63, 1000)
    volume = tree.disk("dm-0", "253:0", 900)
    (tree.root / "class/block/dm-0").symlink_to(volume)
    (part / "holders/dm-0").symlink_to(volume)
    other = tree.partition(disk, "sda2", "8:2", 2000, 1000)
    (tree.root / "mountinfo").write_text(
        "30 1 253:0 / /srv rw - xfs /dev/mapper/vg-lv rw,attr2\n"
        "31 1 0:40 / /net rw - nfs4 host:/dev/sda1 rw\n"
    )
    assert [one.points for one in file_systems(BlockDevice.of_number(8, 1))] == [(Path("/srv"),)]
    assert [one.kind for one in file_systems(BlockDevice.of_number(8, 0))] == ["xfs"]
    assert file_systems(BlockDevice.of_number(8, 2)) == []
    assert other.exists()


def test_btrfs_of_several_devices(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"/dev/sdb": (8, 16), "/dev/sdc": (8, 32)}
    monkeypatch.setattr(find, "stack", SimpleNamespace(device_number=numbers.get))
    members = tree.root / "fs/btrfs/0a1b-2c/devices"
    members.mkdir(parents=True)
    for name, number in (("sdb", "8:16"), ("sdc", "8:32")):
        (members / name).symlink_to(tree.disk(name, number, 4096))
    (tree.root / "mountinfo").write_text(
        "30 1 0:50 /home /home rw - btrfs /dev/sdb rw,subvol=/home\n"
        "31 1 0:50 / /all ro - btrfs /dev/sdb rw,subvol=/\n"
    )
    (found,) = file_systems(BlockDevice.of_number(8, 32))
    assert found == FileSystem(
        "0:50", "btrfs", (Path("/home"), Path("/all")), frozenset(numbers.values())
    )
    (tree.root / "mountinfo").write_text("")
    with pytest.raises(Refused, match="btrfs on sdc"):
        file_systems(BlockDevice.of_number(8, 32))


# Hooks


def test_hooks_run_in_order_around_the_freeze(lab: Lab, ext4: Mounted) -> None:
    log = ext4.point / "log"  # of the frozen file system: they run while it is not
    word = f"$BLKTRACK_PHASE $BLKTRACK_DEVICE >> {log}"
    with ext4.freeze(pre=[f"echo 1 {word}", f"echo 2 {word}"], post=[f"echo 3 {word}", "true"]):
        assert log.read_text() == f"1 pre {ext4.path}\n2 pre {ext4.path}\n"
    assert log.read_text().splitlines()[2:] == [f"3 post {ext4.path}"]


def test_a_failing_pre_hook(lab: Lab, ext4: Mounted) -> None:
    log = lab.name("log")
    pre = [f"echo 1 >> {log}", "echo busy >&2; exit 7", f"echo 2 >> {log}"]
    freeze = ext4.freeze(pre=pre, post=[f"echo 3 >> {log}"])
    assert not_entered(freeze, NoPoint, "ended with code 7: busy").exit_code == 4
    assert log.read_text() == "1\n3\n"
    assert_thawed(ext4)


def test_a_slow_pre_hook(lab: Lab, ext4: Mounted) -> None:
    log = lab.name("log")
    began = time.monotonic()
    freeze = ext4.freeze(pre=[f"sleep 600 & echo $! > {log}; wait"], hook_limit=0.3)
    not_entered(freeze, NoPoint, r"longer than 0\.3 s")
    assert time.monotonic() - began < 0.3 + SLACK
    child = int(log.read_text())
    wait_until(lambda: not alive(child), "the end of what the hook started")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_post_hooks_run_whatever_happened(lab: Lab, ext4: Mounted) -> None:
    log = lab.name("log")
    post = ["kill -9 $$", f"echo 1 >> {log}"]
    with pytest.raises(RuntimeError), ext4.freeze(post=post):
        raise RuntimeError
    with pytest.raises(FreezeExpired), ext4.freeze(post=post):
        let_go(ext4.point)
    with ext4.freeze(post=post) as freeze:
        pass
    assert log.read_text() == "1\n1\n1\n"
    assert freeze.warnings == ["the post hook 'kill -9 $$' failed: signal 9 killed it"]
