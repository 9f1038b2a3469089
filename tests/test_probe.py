"""`doctor --probe` and the quick part of it in `track`: what is broken is named and refused."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blktrack import linux
from blktrack.bpf import compile, layout
from blktrack.bpf.kernel import Kernel
from blktrack.cli import main
from blktrack.config import BPFFS
from blktrack.errors import Refused
from blktrack.probe import battery, room, throttle, verdict
from blktrack.probe.bench import Bench, Range, Unseen
from blktrack.probe.devices import KINDS, Absent
from blktrack.probe.probes import PROBES, Probe
from blktrack.report import Probed, ProbedKind, ProbeReport
from blktrack.sysfs import BlockDevice
from blktrack.tracker import service
from blktrack.units import KIB, MIB
from tests.background import UNSHARED, Running, assert_clear
from tests.bench import beside_progress
from tests.blockdev import Done, Lab, Silent, run, wait_until
from tests.schema import DOCTOR, PROBE, faults
from tests.test_oracle import broken_programs

pytestmark = pytest.mark.needs("root", "loop", "bpf")

KIND = {kind.name: kind for kind in KINDS}
on_loop = "loop"
on_zram = pytest.param("zram", marks=pytest.mark.needs("zram"))


class Watched(room.Room):
    """Remembers what it had."""

    had: list[str]

    def __enter__(self) -> Watched:
        type(self).had = []
        super().__enter__()
        self.had.append(self.tag)
        return self

    def note(self, kind: str, value: str) -> None:
        super().note(kind, value)
        self.had.append(f"{kind} {value}")


def left(had: list[str]) -> list[str]:
    """What there still is of what a probe had: its tag, then its notes."""
    tag, *notes = had
    found = [str(path) for path in BPFFS.glob(f"*{tag}*")]
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found += [str(file)] if tag in file.read_text() else []
    for note in notes:
        kind, number, *_ = note.split()
        path = Path(f"/sys/block/zram{number}") if kind == "zram" else Path(number)
        found += [note] if path.exists() else []
    return found


@pytest.fixture
def had(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Watched]]:
    monkeypatch.setattr(battery, "Room", Watched)
    yield Watched
    assert left(Watched.had) == []


def only(kind: str, *names: str) -> ProbedKind:
    """The verdict on one kind, by all probes or these."""
    chosen = [probe for probe in PROBES if probe.name in names or not names]
    return battery.run([KIND[kind]], chosen).kinds[0]


def failed(found: ProbedKind) -> dict[str, str]:
    return {probe.name: probe.reason for probe in found.probes if probe.result == "failed"}


@pytest.mark.needs("zram")
def test_this_kernel_passes(lab: Lab) -> None:
    done = lab.blktrack("doctor", "--probe", "--json")
    assert (done.code, beside_progress(done.err)) == (0, "")
    assert not faults(done.json, DOCTOR | {"probe": PROBE}), done.out
    kinds = {kind["kind"]: kind for kind in done.json["probe"]["kinds"]}
    assert list(kinds) == [kind.name for kind in KINDS]
    for kind in kinds.values():
        assert [probe["name"] for probe in kind["probes"]] == [probe.name for probe in PROBES]
        assert {probe["result"] for probe in kind["probes"]} <= {"passed", "not here"}
        for probe in kind["probes"]:
            assert (probe["result"] == "passed") == (probe["reason"] == "")
    absent = {
        name: {probe["name"] for probe in kind["probes"] if probe["result"] == "not here"}
        for name, kind in kinds.items()
        if kind["verdict"] == "trusted"
    }
    assert absent["loop"] <= {"throttle"}
    assert absent["zram"] <= {"throttle", "partition"}


@pytest.mark.needs("zram")
def test_as_a_table(lab: Lab) -> None:
    done = lab.blktrack("doctor", "--probe")
    assert done.code == 0, done
    _, table, kinds = done.out.split("\n\n")
    head, *rows = table.split("\n")
    assert head.split() == [kind.name for kind in KINDS]
    assert [row[:24].strip() for row in rows] == [probe.told for probe in PROBES]
    assert all(set(row[24:].split()) <= {"passed", "-"} for row in rows)
    assert "loop (request-based): trusted\n" in kinds
    assert "zram (bio-based): trusted\n  without partition: such a device takes no" in kinds
    for name in ("null_blk", "dm"):
        assert re.search(rf"^{name} \(bio-based\): (trusted|not probed: )", kinds, re.MULTILINE)


def test_nothing_stays(had: type[Watched]) -> None:
    report = battery.run()
    assert report.ok
    assert report.kinds[0].verdict == "trusted"
    assert had.had


HARMLESS = "	if (HARMLESS(op))\n		return;\n"
HARMLESS_BIO = "	if (!its_turn(copy, KIND_BIO, bio) || HARMLESS(op))\n"
PLACE = "(first - w->start) >> w->shift, (end - 1 - w->start) >> w->shift"
# What is broken: the text, the text in its place, the kind on which it shows, and how.
BREAKAGES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "discards are ignored": (
        HARMLESS,
        HARMLESS.replace("))", ") || op == REQ_OP_DISCARD)"),
        "loop",
        {"discard": "2 MiB of 2 MiB were not seen to begin"},
    ),
    "discards of bios are ignored": (
        HARMLESS_BIO,
        HARMLESS_BIO.replace("))", ") || op == REQ_OP_DISCARD)"),
        "zram",
        {"discard": "2 MiB of 2 MiB were not seen to begin"},
    ),
    "zeroing is ignored": (
        HARMLESS,
        HARMLESS.replace("))", ") || op == 9)"),  # REQ_OP_WRITE_ZEROES
        "loop",
        {"punch": "2 MiB of 2 MiB were not seen to begin"},
    ),
    "only the end of a change is marked": (
        "		mark_request(rq, SUBMITTED, &FIELD(u32, rq, RQ_DATA_LEN));\n",
        "		;\n",
        "loop",
        {"disk": "were not seen to begin", "split": "4 MiB of 4 MiB were not seen to begin"},
    ),
    "a long bio has the length of its last part when it ends": (
        "	entry.bytes = bytes;\n",
        "	entry.bytes = bytes > (3 << 20) ? bytes & 1048575 ? : 1048576 : bytes;\n",
        "zram",
        {"split": "3 MiB of 4 MiB were not seen to end"},
    ),
    "a partition's window is taken for the disk": (
        PLACE,
        PLACE.replace(" - w->start", ""),
        "loop",
        {"partition": "were not seen to begin"},
    ),
    "the last granule of a range is left out": (
        "tail = ~0ULL >> (63 - (last & 63))",
        "tail = ~0ULL >> 1 >> (63 - (last & 63))",
        "loop",
        {"disk": "not seen to", "page-cache": "not seen to", "flush": "not seen to"},
    ),
    "more is marked than was changed": (
        "	u64 first = c->sector, end = c->sector + c->sectors;\n",
        "	u64 first = c->sector, end = c->sector + c->sectors + 1024;\n",
        "loop",
        {"disk": "a change was seen to begin at byte ", "split": "where there was none"},
    ),
    "what waited for its limit is not seen": (
        "	if (!bytes)\n",
        "	if (!bytes || bytes == 524288)\n",
        "zram",
        {"throttle": "512 KiB of 512 KiB were not seen to begin"},
    ),
}


BROAD = (  # these show in all that is written
    "only the end of a change is marked",
    "the last granule of a range is left out",
    "more is marked than was changed",
)


def breakages() -> Iterator[Any]:
    for name, (_, _, kind, expected) in BREAKAGES.items():
        needs = {"zram"} & {kind} | ({"io_limit"} if "throttle" in expected else set())
        yield pytest.param(name, marks=pytest.mark.needs(*needs))


@pytest.mark.parametrize("breakage", list(breakages()))
def test_what_is_broken_is_named(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, had: type[Watched], breakage: str
) -> None:
    old, new, kind, expected = BREAKAGES[breakage]
    broken_programs(lab, monkeypatch, old, new)
    found = only(kind)
    assert found.verdict == "not trusted"
    for name, reason in expected.items():
        assert reason in failed(found)[name], found
        assert f"{name}: " in found.reason
    assert failed(found).keys() == expected.keys() or breakage in BROAD


def test_a_flush_that_is_taken_for_a_change(
    monkeypatch: pytest.MonkeyPatch, had: type[Watched]
) -> None:
    monkeypatch.setattr(layout, "_HARMLESS", ("READ",))
    assert "pass-through or unknown commands" in failed(only("loop", "flush"))["flush"]


@pytest.mark.parametrize("kind", [on_loop, on_zram])
def test_an_epoch_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, had: type[Watched], kind: str
) -> None:
    monkeypatch.setattr(Kernel, "swap", lambda self, slot, retired: None)
    assert failed(only(kind)) == {"swap": "marks were made in the wrong one of the two maps"}


def test_what_goes_unseen_once_is_no_failure(had: type[Watched]) -> None:
    """A host may run no program for a completion; tracking covers that."""
    turns: list[int] = []

    def once(bench: Bench, place: int) -> list[Range]:
        turns.append(place)
        if len(turns) < 3:
            raise Unseen("it was not seen")
        return [bench.write(place, 4 * KIB)]

    def never(bench: Bench, place: int) -> list[Range]:
        bench.write(place, 4 * KIB)
        raise OSError(5, "Input/output error")

    chosen = [Probe("once", "", once), Probe("never", "", never)]
    (found,) = battery.run([KIND["loop"]], chosen).kinds
    assert len(set(turns)) == 3
    assert found.probes == [
        Probed("once", "passed", ""),
        Probed("never", "failed", "the device refused it (Input/output error)"),
    ]


# What track does with it.


def kept(lab: Lab) -> dict[str, str]:
    return verdict._read(lab.store.paths)


def never_run(*_: object) -> Any:
    pytest.fail("it was probed again")


def test_track_probes_once_for_each_kernel(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    device, other = lab.loop(4 * MIB), lab.loop(4 * MIB)
    assert kept(lab) == {}
    assert main(["track", device, "--quiet"]) == 0
    assert kept(lab) == {"loop": ""}
    with monkeypatch.context() as patch:
        patch.setattr(battery, "run", never_run)
        patch.setenv("BLKTRACK_BOOT_ID", "another boot")
        assert main(["track", other, "--quiet"]) == 0
    lab.untrack(device)
    lab.untrack(other)
    build = lab.name("version")
    build.write_text("#2 SMP another build\n")
    monkeypatch.setattr(verdict, "_VERSION", build)
    assert kept(lab) == {}
    ran: list[str] = []
    real = battery.run

    def counted(kinds: Any, *rest: Any) -> Any:
        ran.extend(kind.name for kind in kinds)
        return real(kinds, *rest)

    monkeypatch.setattr(battery, "run", counted)
    assert main(["track", device, "--quiet"]) == 0
    assert (ran, kept(lab)) == (["loop"], {"loop": ""})
    monkeypatch.undo()
    assert kept_of(lab) == ["loop", "loop"], "of both kernels"


def kept_of(lab: Lab) -> list[str]:
    paths = lab.store.paths
    return [name for entry in verdict._entries(paths) for name in entry["failed"]]


@pytest.mark.parametrize("kind", [on_loop, on_zram])
def test_track_refuses_what_failed(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    device = lab.device("loop-512" if kind == "loop" else kind, 4 * MIB)[0]
    says = f"blktrack: {device}: this kernel, {os.uname().release}, does not show all changes of "
    text = HARMLESS if kind == "loop" else HARMLESS_BIO
    with monkeypatch.context() as patch:
        broken_programs(lab, patch, text, text.replace("))", ") || op == REQ_OP_DISCARD)"))
        assert main(["track", device]) == 1
        told = capsys.readouterr()
        assert told.err.startswith(says) and told.out == ""
        assert f"on a scratch {kind} device: discard: 2 MiB of 2 MiB were not seen" in told.err
        assert "  -> blktrack doctor --probe shows more" in told.err
        assert lab.blktrack("status", "--json").json["devices"] == []
        with patch.context() as more:
            more.setattr(battery, "run", never_run)
            assert main(["track", device]) == 1
        assert capsys.readouterr() == told, "remembered"
        if kind != "loop":
            return
        assert main(["doctor", "--probe"]) == 1
        out = capsys.readouterr().out
        assert re.search(r"^discards .* FAILED", out, re.MULTILINE)
        assert f"{kind} ({KIND[kind].based}-based): not trusted: discard: " in out
        # Now these programs are as they should be, as if a fluke were over.
        good = Path(layout.__file__).with_name("track.c").read_text(encoding="utf-8")
        known = verdict.this_kernel()
        patch.setattr(verdict, "this_kernel", lambda: known)
        (compile._HERE / "track.c").write_text(good, encoding="utf-8")
        assert main(["track", device, "--quiet"]) == 1
        assert main(["doctor", "--probe", "--json"]) == 0
        assert main(["track", device, "--quiet"]) == 0
        lab.untrack(device)


def test_what_cannot_be_probed_is_a_warning(lab: Lab) -> None:
    """Without loop devices, tracking goes on, and the next call tries again."""
    device = lab.loop(4 * MIB)
    script = 'mount --bind /dev/null /dev/loop-control; exec "$@"'
    words = (*UNSHARED, "sh", "-ec", script, "sh")
    done = Running(lab, "track", device, prefix=words).end()
    assert done.code == 0, done
    assert beside_progress(done.err) == (
        "blktrack: warning: whether this kernel shows all changes could not be probed: no scratch "
        "loop device can be made: Inappropriate ioctl for device; tracking goes on, and notices "
        "what it can\n"
    )
    assert kept(lab) == {}
    done = Running(lab, "doctor", "--probe", prefix=words).end()
    assert "loop (request-based): not probed: no scratch loop device can be made" in done.out
    assert "loop" not in kept(lab)
    assert beside_progress(lab.blktrack("track", device).err) == ""
    assert kept(lab)["loop"] == ""


def test_another_kernel_under_a_tracked_device(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync, or the start at boot, that finds one asks it before it tracks on."""
    device, replica = lab.loop(4 * MIB), lab.name("replica")
    lab.track(device)
    lab.sync(device, replica)
    assert kept(lab) == {}, "these asked nobody"

    def reboot() -> None:
        (state,) = lab.store.devices()
        state.release, state.boot_id = "5.99.0", "another"
        lab.store.save_device(state)

    reboot()
    script = 'mount --bind /dev/null /dev/loop-control; exec "$@"'
    words = (*UNSHARED, "sh", "-ec", script, "sh")
    done = Running(lab, "sync", device, replica, prefix=words).end()
    assert done.code == 0, done
    assert "warning: whether this kernel shows all changes could not be probed" in done.err
    with monkeypatch.context() as patch:
        bad = [Probed("disk", "failed", "it was not seen")]
        found = ProbeReport(False, 0.0, [ProbedKind("loop", "request", "not trusted", "", bad)])
        patch.setattr(battery, "run", lambda *_: found)
        reboot()
        with pytest.raises(Refused, match="does not show all changes"):
            lab.sync(device, replica)
        (action,) = service.start(lab.store, None)
        assert (action.action, action.hint[:23]) == ("failed", "blktrack doctor --probe")
        assert kept(lab) == {"loop": "disk: it was not seen"}
    (lab.store.paths.lib / "probe.json").unlink()
    (action,) = service.start(lab.store, None)
    assert (action.action, kept(lab)) == ("began", {"loop": ""})
    assert lab.sync(device, replica).mode == "resync"


def test_a_damaged_verdict_is_found_anew(lab: Lab) -> None:
    device = lab.loop(4 * MIB)
    file = lab.store.paths.lib / "probe.json"
    file.parent.mkdir(parents=True)
    for text in ("{", '{"format": 99}'):
        file.write_text(text)
        assert kept(lab) == {}
    assert main(["track", device, "--quiet"]) == 0
    assert kept(lab) == {"loop": ""}


@pytest.mark.needs("zram")
def test_each_device_has_the_verdict_of_what_it_is_like(lab: Lab, tmp_path: Path) -> None:
    def like(device: BlockDevice) -> list[str]:
        return [kind.name for kind in verdict._like(device)]

    assert like(BlockDevice.find(lab.loop(MIB))) == ["loop"]
    assert like(BlockDevice.find(lab.zram(MIB))) == ["zram", "dm", "null_blk"]
    for name in ("md0", "dm-3"):
        device = BlockDevice(f"/dev/{name}", name, tmp_path, (9, 0))
        assert like(device) == ["dm", "null_blk", "zram"]


def test_no_bpffs_no_programs_no_probe(lab: Lab) -> None:
    words = ("setpriv", "--reuid=65534", "--clear-groups")
    done = Running(lab, "doctor", "--probe", prefix=words).end()
    assert done.code == 1
    assert "FAIL  root" in done.out
    assert done.out.endswith("\nnothing was probed, as tracking cannot work here\n")


def test_wrong_usage(lab: Lab) -> None:
    for words, says in (
        (("--prob",), "there is no option --prob; did you mean --probe?"),
        (("--probe", "loop"), "'loop' is one argument too many"),
    ):
        done = lab.blktrack("doctor", *words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"blktrack doctor: {says}\n  -> ")


# What is left.


def room_of(running: Running) -> Path | None:
    """The room that a command has locked."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{running.process.pid}/fd"):
            with contextlib.suppress(OSError):
                path = Path(os.readlink(entry.path))
                if path.name.startswith("blktrack-probe-"):
                    return path
    return None


def in_the_middle(lab: Lab) -> tuple[Running, list[str]]:
    """A battery that has a zram device by now, and what it has."""
    running, had = Running(lab, "doctor", "--probe"), list[str]()

    def has_come() -> bool:
        assert running.process.poll() is None, running.end()
        found = room_of(running)
        with contextlib.suppress(OSError):
            if found and "zram" in room.notes(found):
                had[:] = [found.name.rpartition("-")[2], f"zram {os.readlink(found / 'zram')}"]
        return bool(had)

    wait_until(has_come, "the probing of zram")
    return running, had


@pytest.mark.needs("zram")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_all_away(lab: Lab, number: int) -> None:
    running, had = in_the_middle(lab)
    running.process.send_signal(number)
    done = running.end()
    done = Done(done.code, done.out, beside_progress(done.err))
    assert_clear(done, 128 + number, "the probe was interrupted", "nothing is left of it")
    assert left(had) == []
    assert kept(lab) == {}


@pytest.mark.needs("zram")
def test_what_a_killed_probe_left_goes_with_the_next(lab: Lab) -> None:
    running, had = in_the_middle(lab)
    os.kill(running.process.pid, signal.SIGSTOP)
    room.sweep()
    assert left(had), "it is not dead"
    running.process.kill()
    running.end()
    wait_until(lambda: left(had) != [], "nothing")
    assert len(left(had)) >= 3, "room, pins and device"
    assert main(["track", lab.loop(4 * MIB), "--quiet"]) == 0
    assert left(had) == []


@pytest.mark.needs("zram")
def test_a_device_of_the_same_number_is_left_alone(lab: Lab) -> None:
    """What was noted was removed by hand, and its number given to another."""
    device = lab.zram(4 * MIB)
    number = device.removeprefix("/dev/zram")
    with room.Room(Silent()) as made:
        made.note("zram", f"{number} 1")
        made.note("dm", made.folder.name)
        made.note("null_blk", "/sys/kernel/config/nullb/none")
        made.note("cgroup", "/sys/fs/cgroup/none")
    assert not made.folder.exists()
    assert BlockDevice.find(device).size == 4 * MIB


@pytest.mark.needs("zram")
def test_what_cannot_be_removed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    monkeypatch.setattr(room, "PATIENCE", 0.05)

    def keep(bench: Bench, place: int) -> list[Range]:
        held.append(os.open(bench.device.path, os.O_RDONLY))
        return []

    observer = Silent()
    report = battery.run([KIND["zram"]], [Probe("keep", "", keep)], observer)
    assert report.ok
    message = r"could not be removed \(zram \d+ \d+: Device or resource busy\)"
    assert re.search(message, observer.warnings[0]), observer.warnings
    (device,) = {os.readlink(f"/proc/self/fd/{fd}") for fd in held}
    os.close(held[0])
    room.sweep()
    assert not Path(device).exists()


def test_two_at_once(lab: Lab) -> None:
    both = [Running(lab, "doctor", "--probe", "--json") for _ in range(2)]
    for done in [running.end() for running in both]:
        assert (done.code, beside_progress(done.err)) == (0, ""), done


# What is not here.


def test_no_limits_of_io(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each way not to have them is said."""
    device = BlockDevice.find(lab.loop(4 * MIB))
    mount = type("Mount", (), {})
    two: Any = mount()
    two.kind, two.point, two.options = "cgroup2", tmp_path, "rw"
    table: list[Any] = []
    monkeypatch.setattr(throttle, "mounts", lambda: table)

    def said() -> str:
        with room.Room(Silent()) as made, pytest.raises(Absent) as caught:
            throttle.write(made, device, 0)
        return str(caught.value)

    assert said() == "no cgroup file system is mounted"
    table.append(two)
    assert said() == "no cgroup file system is mounted"
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    assert said() == f"the io controller is not enabled in {tmp_path}"
    # No real one: dd is not held up.
    (tmp_path / "cgroup.subtree_control").write_text("cpu io memory\n")
    with monkeypatch.context() as patch:
        patch.setitem(room._REMOVE, "cgroup", lambda path: run("rm", "-r", path) and None)
        assert said() == "io.max holds nothing up"


def test_a_device_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither discards nor to be punched: no failure."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(linux, "discard", refuse)
    monkeypatch.setattr(linux, "punch_hole", refuse)
    punch, discard = only("loop", "punch", "discard").probes
    assert (punch.result, punch.reason[:24]) == ("not here", "such a device cannot zer")
    assert (discard.result, discard.reason) == ("not here", "such a device takes no discards")


@pytest.mark.needs("zram")
def test_a_kernel_that_writes_zram_by_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a device is not trusted, and others on bios are: it is no failure of a probe."""
    monkeypatch.setattr(layout, "has_rw_page", lambda _: True)
    report = battery.run([KIND["zram"]], PROBES[:1])
    assert report.ok
    assert report.kinds[0].verdict == "not trusted"
    assert "page by page" in report.kinds[0].reason
    assert verdict._failed(report.kinds[0]) == ""
