"""What `track` says where the kernel or its tools do not let it track; each lack is made real."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import pytest

from blktrack.bpf import compile as bcc
from blktrack.bpf import kernel, layout
from blktrack.bpf.abi import MAPS
from blktrack.bpf.kernel import Detached
from blktrack.bpf.programs import BY_KIND
from blktrack.bpf.view import View
from blktrack.errors import BlktrackError, Refused
from blktrack.tracker.generation import window_of
from blktrack.tracker.tracker import find
from blktrack.units import MIB
from tests.background import UNSHARED, Running, assert_clear
from tests.blockdev import TOP, Done, Lab

pytestmark = pytest.mark.needs("root", "loop", "bpf")

SIZE = 4 * MIB
BCC = "$(/usr/bin/python3 -c 'import bcc, os; print(os.path.dirname(bcc.__file__))')"
SOURCE = Path(bcc.__file__).with_name("track.c")


def track(lab: Lab, device: str, before: str = "true", *prefix: str) -> Done:
    """In a mount namespace of its own, after `before`, under `prefix`."""
    words = (*UNSHARED, "sh", "-c", f'set -e; {before}; exec "$@"', "sh", *prefix)
    return Running(lab, "track", device, "--quiet", prefix=words).end()


def pinned(lab: Lab) -> list[Path]:
    return [path for name in MAPS for path in lab.store.paths.pins.glob(f"*/{name}")]


@pytest.mark.parametrize(
    ("before", "prefix", "says", "remedy"),
    [
        (f"mount -t tmpfs none {BCC}", "", "bcc's Python module is not installed", "apt-get"),
        ("", "setpriv --bounding-set=-perfmon,-sys_admin", "refused a tracking program", "doctor"),
        (
            "umount -l /sys/fs/bpf; mount -t tmpfs -o ro none /sys/fs",
            "",
            "cannot mount bpffs on /sys/fs/bpf: Read-only file system",
            "mount -t bpf",
        ),
        ("mount -o remount,ro,bind /sys/fs/bpf", "", "cannot pin the tracking maps in", "doctor"),
        ("", "prlimit --nofile=7", "cannot make the tracking maps: ", "doctor"),
    ],
    ids=["bcc", "program", "bpffs", "pins", "maps"],
)
def test_what_programs_need(lab: Lab, before: str, prefix: str, says: str, remedy: str) -> None:
    device = lab.loop(SIZE)
    assert_clear(track(lab, device, before or "true", *prefix.split()), 1, says, remedy)
    assert lab.blktrack("status", "--json").json["devices"] == []
    found = sorted(lab.store.paths.pins.glob("*/*"))
    assert found in ([], sorted(pinned(lab))), "all maps or none"


def test_a_source_that_does_not_compile(lab: Lab) -> None:
    device, broken = lab.loop(SIZE), lab.name("broken")
    broken.write_text(SOURCE.read_text(encoding="utf-8") + "\nint x", encoding="utf-8")
    done = track(lab, device, f"mount --bind {broken} {SOURCE.relative_to(TOP)}")
    assert (done.code, done.out) == (1, "")
    *_, says, hint = done.err.strip().split("\n")
    assert says.startswith("blktrack: bcc cannot compile the tracking programs: "), done.err
    assert "its own messages are above; blktrack doctor" in hint
    assert "error: " in done.err, "what the compiler says"


def test_too_few_open_files(lab: Lab) -> None:
    """Wherever it is that they run out, there is one sentence, and nothing is left behind."""
    device, found = lab.loop(SIZE), ""
    for limit in range(11, 24):
        done = track(lab, device, "true", "prlimit", f"--nofile={limit}")
        assert done.code in (0, 1) and "Traceback" not in done.err, done.err
        found += done.err
        if done.code == 0 or "attach" in found:
            break
        assert "  -> " in done.err
        assert lab.blktrack("status", "--json").json["devices"] == []
    assert "the kernel refused to attach the tracking programs: " in found, found


def test_too_few_open_files_for_a_sync(shared: Lab) -> None:
    """It is no reason to doubt what is tracked."""
    device, replica, found = shared.loop(SIZE), shared.name("replica"), ""
    shared.track(device)
    shared.sync(device, replica)
    for limit in range(8, 40):
        words = ("prlimit", f"--nofile={limit}")
        done = Running(shared, "sync", device, replica, "--no-resync", prefix=words).end()
        if done.code == 0:
            break
        assert done.code == 1 and "  -> " in done.err, done
        found += done.err
    assert "cannot open what tracking has in the kernel: Too many open files" in found
    assert "ulimit -n" in found
    assert shared.sync(device, replica).mode == "nothing"


def test_too_few_open_files_for_figures(shared: Lab) -> None:
    """They are what there is, with a warning."""
    shared.track(shared.loop(SIZE))
    found = ""
    for limit in range(6, 24):
        done = Running(shared, "metrics", prefix=("prlimit", f"--nofile={limit}")).end()
        assert done.code in (0, 1) and "Traceback" not in done.err, done.err
        found += done.err
        if "without what the kernel knows" in found:
            break
    assert "without what the kernel knows: cannot open what tracking has" in found


def test_no_memory_for_the_maps_of_a_device(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> int:
        raise OSError(errno.ENOMEM, "bpf_map_create: Cannot allocate memory")

    device = shared.loop(SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "create_inner", refuse)
        with pytest.raises(BlktrackError, match=r"cannot make the dirty maps .* memory") as caught:
            shared.track(device)
    assert "choose a larger --granularity" in caught.value.hint
    shared.track(device)
    assert shared.status(device)["state"] == "tracking"


@pytest.mark.needs("zram")
def test_a_kernel_that_writes_zram_by_the_page(
    shared: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 6.3: this one has nothing of the kind."""
    device = shared.zram(SIZE)
    monkeypatch.setattr(layout, "has_rw_page", lambda _: True)
    with pytest.raises(Refused, match="can be written page by page") as caught:
        shared.track(device)
    assert "Linux 6.3" in caught.value.hint


def test_pins_that_are_gone_under_a_live_view(lab: Lab) -> None:
    """`top` and the figures read what is pinned, and hold nothing."""
    device = lab.loop(SIZE)
    lab.track(device)
    state, found = find(lab.store, device)
    window = window_of(found, state.size, state.granularity)
    pins = next(lab.store.paths.pins.iterdir())
    with contextlib.closing(View(lab.store.paths.pins)) as view:
        view.refresh()
        assert len(view.planes(state.slot, window.geometry)) == 2
        (pins / f"slot_{state.slot}_a").unlink()
        with pytest.raises(Detached, match="are no longer pinned"):
            view.planes(state.slot, window.geometry)
        (pins / f"link_{BY_KIND[window.kind][0]}").unlink()
        view.refresh()
        with pytest.raises(Detached, match=r"program .* is no longer pinned"):
            view.programs(window.kind)
        for name in MAPS:
            (pins / name).unlink()
        view.refresh()
        with pytest.raises(Detached, match="the tracking maps are gone from"):
            view.kernel.close()
    assert lab.status(device)["state"] == "gap"
