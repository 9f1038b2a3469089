"""Freezes of real file systems under load: of several at once, and with hooks around them."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path

import pytest

from blktrack import linux, sysfs
from blktrack.errors import NoPoint, Refused
from blktrack.quiesce.find import FileSystem, file_systems
from blktrack.quiesce.freeze import Freeze, FreezeExpired
from blktrack.sysfs import BlockDevice
from blktrack.units import MIB
from tests.blockdev import Lab, run, told, wait_until
from tests.freezes import (
    KINDS,
    SIZE,
    SLACK,
    Load,
    Mounted,
    alive,
    assert_thawed,
    ext4,
    let_go,
    not_entered,
)

__all__ = ["ext4"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop", "ext4")


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
