"""The policy file: what it comes to, and how each mistake in it is told."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from blktrack.cli import main
from blktrack.config import Paths
from blktrack.policy import LinkPolicy, Policy, PolicyError, load, read
from blktrack.policy.check import check, stable_name
from blktrack.policy.model import same_device
from blktrack.policy.read import DEFAULT_KEYS, DEVICE_KEYS, REPLICA_KEYS
from blktrack.rates import Rates, Window
from blktrack.ship.limit import RateLimit
from blktrack.units import MIB
from tests.blockdev import Lab
from tests.loopdev import Disks

Capsys = pytest.CaptureFixture[str]

DOCS = Path(__file__).resolve().parent.parent / "docs/policy.md"

WHOLE = """
[defaults]
consistency = "crash"
rpo = "15m"
rpo-warning = "10m"
rpo-error = "30m"
limit = "100M"
windows = [{ days = "mon-fri", from = "08:00", to = "18:00", limit = "20M" }]
pre-freeze = ["hold"]
post-freeze = "go"
freeze-cap = "500ms"
history = "30d"
jobs = 2

[device.data]
path = "/dev/disk/by-id/wwn-1"
granularity = "64K"
rpo = "1h"

[device.data.replica.near]
target = "/backup//data.img"

[device.data.replica.far]
target = "/mnt/far/data.img"
consistency = "none"
limit = "none"
enabled = false
in-place = true

[device.logs]
path = "/dev/vg0/logs"

[device.logs.replica.near]
target = "/backup/logs.img"
rpo-error = "20m"
freeze-cap = 1
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "blktrack.toml"
    path.write_text(text, encoding="utf-8")
    return path


def link_of(policy: Policy, device: str, name: str) -> LinkPolicy:
    found = next(entry for entry in policy.devices if entry.name == device)
    return next(link for link in found.links if link.name == name)


def test_what_is_left_open_is_inherited(tmp_path: Path) -> None:
    policy = load(written(tmp_path, WHOLE.replace('"500ms"', "0.5")))
    assert policy.jobs == 2
    assert [device.granularity for device in policy.devices] == [65536, None]
    near, far = link_of(policy, "data", "near"), link_of(policy, "data", "far")
    logs = link_of(policy, "logs", "near")
    office = Window(frozenset(range(5)), 8 * 60, 18 * 60, 20 * MIB)
    assert near == LinkPolicy(
        name="near",
        device="/dev/disk/by-id/wwn-1",
        target="/backup/data.img",
        freeze_cap=0.5,
        pre_freeze=("hold",),
        post_freeze=("go",),
        rates=Rates(100 * MIB, (office,)),
        history=30 * 86400,
        # The thresholds above are those of another promise.
        rpo=3600,
        rpo_warning=3600,
        rpo_error=7200,
    )
    assert far.rates == Rates(None), "a limit leaves the windows of another behind"
    assert (far.enabled, far.in_place, far.consistency) == (False, True, "none")
    assert far.pre_freeze == far.post_freeze == (), "nothing is frozen, and no hook runs"
    assert (logs.rpo, logs.rpo_warning, logs.rpo_error) == (900, 600, 1200)
    assert logs.freeze_cap == 1


def test_options_of_a_link(tmp_path: Path) -> None:
    policy = load(written(tmp_path, WHOLE.replace('"500ms"', "0.5")))
    options = link_of(policy, "data", "near").options()
    assert (options.consistency, options.freeze, options.cap) == ("crash", True, 0.5)
    assert (options.pre, options.post) == (("hold",), ("go",))
    assert options.limit.least == 20 * MIB
    assert options.history == 30 * 86400


def test_a_replica_on_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        '[defaults]\nretry-for = "10m"\ncompress = 9\n[device.a]\npath = "/dev/vg/a"\n'
        '[device.a.replica.near]\ntarget = "/b"\n'
        '[device.a.replica.far]\ntarget = "ssh://me@host:22//b/./a%62.img"\n'
        'retry-for = 0\npeer-timeout = 5\ntime-limit = "4m30s"\ncompress = "none"\n'
    )
    policy = load(written(tmp_path, text))
    near, far = link_of(policy, "a", "near"), link_of(policy, "a", "far")
    options = far.options()
    assert (options.retry_for, options.compress) == (0, "none")
    assert (options.patience, options.time_limit) == (5, 270)
    assert (near.retry_for, near.compress, near.time_limit) == (600, 9, None)
    assert far.target == "ssh://me@host:22/b/ab.img"
    # As a link remembers it; what is no path is made none.
    monkeypatch.chdir(tmp_path)
    assert policy.link("/dev/vg/a", far.target) == far
    assert policy.link("/dev/vg/a", "ssh://host/b/ab.img") is None


@pytest.mark.needs("root", "loop")
def test_a_host_is_not_reached_to_check(
    tmp_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    text = f'[device.a]\npath = "{disks.loop(MIB)}"\n[device.a.replica.r]\ntarget = "ssh://h/x"\n'
    file = written(tmp_path, f'{text}compress = 3\ntime-limit = "5m"\nretry-for = "3m"\n')
    monkeypatch.setenv("BLKTRACK_SSH", "/bin/false")
    assert not any("ssh" in problem.message for problem in check(load(file)))
    assert main(["config", "check", "--file", str(file)]) == 0
    told = capsys.readouterr().out
    assert "-> ssh://h/x  crash" in told
    assert "gives up after 5m; zstd 3; tried again for 3m" in told
    monkeypatch.setenv("BLKTRACK_SSH", "/nowhere/ssh -v")
    (found,) = (found for found in check(load(file)) if found.key.endswith(".target"))
    assert "there is no /nowhere/ssh" in found.message and found.hint == "correct BLKTRACK_SSH"
    file.write_text(f'{text}compress = "none"\n', encoding="utf-8")
    assert main(["config", "check", "--file", str(file)]) == 0
    assert "not compressed" in capsys.readouterr().out


def test_no_file_is_no_policy(tmp_path: Path) -> None:
    policy = load(tmp_path / "none.toml")
    assert not policy.exists
    assert list(policy.links) == []
    assert policy.link("/dev/null", "/backup") is None


DEVICE = '[device.a]\npath = "/dev/vg/a"\n'
REPLICA = '[device.a.replica.r]\ntarget = "/b"\n'


@pytest.mark.parametrize(
    ("text", "key", "message", "hint"),
    [
        ("x", "", "is not TOML", "quotes"),
        ("[device\n", "", "is not TOML", "quotes"),
        (f"x = {'[' * 5000}", "", "is not TOML", "quotes"),
        (f"x = {'9' * 5000}", "", "is not TOML", "quotes"),
        (f"[defaults]\nrpo = {'9' * 400}", "defaults.rpo", "is not valid", "a clock can tell"),
        ("devices = 1", "devices", "is not a known key", "did you mean device?"),
        ("device = 1", "device", "is not a table", "write [device]"),
        ("[device]\na = 1", "device.a", "is not a table", "[device.a]"),
        ('[device]\npath = "/dev/a"', "device.path", "is not a table", "under [device.NAME]"),
        ("[defaults]\nrop = 1", "defaults.rop", "is not a known key", "did you mean rpo?"),
        ("[defaults]\nrpo_error = 1", "defaults.rpo_error", "not a known key", "rpo-error?"),
        ("[defaults]\nqqq = 1", "defaults.qqq", "is not a known key", "known: compress"),
        ('[defaults]\npath = "/dev/a"', "defaults.path", "is not a known key", ""),
        ("[device.a]\n" + REPLICA, "device.a", "has no path", "by-id"),
        (DEVICE, "device.a", "has no replica", "[device.a.replica.NAME]"),
        (DEVICE + "replica = 3", "device.a.replica", "is not a table", "on a line of its own"),
        (DEVICE + "[device.a.replica.r]", "device.a.replica.r", "has no target", "target"),
        ('[device.a]\npath = "sda"\n' + REPLICA, "device.a.path", "'sda'", "absolute path"),
        ('[device.a]\npath = "/srv"\n' + REPLICA, "device.a.path", "'/srv'", "block device"),
        (DEVICE + REPLICA + 'limit = "0"', "device.a.replica.r.limit", "'0'", "at least 1 byte"),
        (DEVICE + REPLICA + "limit = true", "device.a.replica.r.limit", "true", "a size"),
        (DEVICE + REPLICA + 'limit = "fast"', "device.a.replica.r.limit", "'fast'", "64K"),
        (DEVICE + 'granularity = "x"\n' + REPLICA, "device.a.granularity", "'x'", "64K"),
        (DEVICE + 'granularity = "3K"\n' + REPLICA, "device.a.granularity", "'3K'", "power of two"),
        (DEVICE + "granularity = 256\n" + REPLICA, "device.a.granularity", "256", "from 512"),
        (DEVICE + 'granularity = "1G"\n' + REPLICA, "device.a.granularity", "'1G'", "to 64 MiB"),
        ("[defaults]\nenabled = 1", "defaults.enabled", "1 is not", "true or false"),
        ("[defaults]\nrpo = 0", "defaults.rpo", "0 is not", "more than 0"),
        ("[defaults]\nrpo = inf", "defaults.rpo", "inf is not", "more than 0"),
        ("[defaults]\nrpo = nan", "defaults.rpo", "nan is not", "more than 0"),
        ('[defaults]\nrpo = "soon"', "defaults.rpo", "'soon' is not", "1h30m"),
        ('[defaults]\nrpo = ""', "defaults.rpo", "'' is not", "1h30m"),
        ("[defaults]\nrpo = []", "defaults.rpo", "[] is not", "5m"),
        ("[defaults]\nfreeze-cap = 61", "defaults.freeze-cap", "61 is not", "at most"),
        ("[defaults]\njobs = 0", "defaults.jobs", "0 is not", "1 to 64"),
        ("[defaults]\njobs = true", "defaults.jobs", "true is not", "1 to 64"),
        ("[defaults]\nconsistency = 3", "defaults.consistency", "3 is not", '"filesystem"'),
        ("[defaults]\npre-freeze = [1]", "defaults.pre-freeze", "[1] is not", "a list"),
        ('[defaults]\npre-freeze = [" "]', "defaults.pre-freeze", "[' '] is not", "a list"),
        ("[defaults]\nwindows = 1", "defaults.windows", "1 is not", "write a list"),
        (
            '[defaults]\nrpo-warning = "2h"\nrpo-error = "1h"',
            "defaults.rpo-warning",
            "is above rpo-error",
            "2h or more",
        ),
        (
            '[defaults]\nconsistency = "filesystem"\nfreeze = false',
            "defaults.freeze",
            "forbids",
            "freeze = true",
        ),
        (
            DEVICE + REPLICA + 'consistency = "none"\npost-freeze = "x"',
            "device.a.replica.r",
            "hooks that would never run",
            "allow a freeze",
        ),
        (
            DEVICE + REPLICA + '[device.b]\npath = "/dev/vg/a"\n[device.b.replica.q]\ntarget="/c"',
            "device.b.path",
            "is the device of device.a too",
            "one table",
        ),
        (
            DEVICE + REPLICA + '[device.a.replica.s]\ntarget = "/x/../b"',
            "device.a.replica.s.target",
            "is the target of device.a.replica.r too",
            "a target of its own",
        ),
        (
            DEVICE + '[device.a.replica.r]\ntarget = "ssh://host"',
            "device.a.replica.r.target",
            "'ssh://host' is not valid",
            "names no file or device on its host; add it: ssh://host/path",
        ),
        (
            DEVICE + '[device.a.replica.r]\ntarget = "ssh://me:secret@host/x"',
            "device.a.replica.r.target",
            "'ssh://me:…@host/x' is not valid",
            "has a password in it; leave it out",
        ),
        (
            DEVICE
            + '[device.a.replica.r]\ntarget = "ssh://host/x"\n'
            + '[device.a.replica.s]\ntarget = "SSH://host//x"',
            "device.a.replica.s.target",
            "is the target of device.a.replica.r too",
            "a target of its own",
        ),
        (
            DEVICE + REPLICA + 'retry-for = "1m"',
            "device.a.replica.r.retry-for",
            "is for a replica on another host",
            "leave it out",
        ),
        ("[defaults]\ncompress = 20", "defaults.compress", "is not valid", "from 1 to 19"),
        ('[defaults]\ncompress = "best"', "defaults.compress", "is not valid", '"adapt"'),
        ("[defaults]\nretry-for = -1", "defaults.retry-for", "is not valid", "more than 0"),
        ("[defaults]\nretry-for = false", "defaults.retry-for", "false is not valid", "a time"),
        ("[defaults]\ntime-limit = 0", "defaults.time-limit", "is not valid", "more than 0"),
        ('[defaults]\npeer-timeout = "2h"', "defaults.peer-timeout", "not valid", "1s to 1h"),
        (
            DEVICE + '[device.a.replica."b.c"]\ntarget = "/x"\n'
            '[device."a.b"]\npath = "/dev/b"\n[device."a.b".replica.c]\ntarget = "/y"',
            "device.a.b.replica.c",
            "is a.b.c for short",
            "by another name",
        ),
    ],
)
def test_each_mistake_is_told_by_its_key(
    tmp_path: Path, text: str, key: str, message: str, hint: str
) -> None:
    path = written(tmp_path, text)
    _, problems = read(path)
    assert [(p.key, message in p.message, hint in p.hint) for p in problems] == [(key, True, True)]
    with pytest.raises(PolicyError) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert key in str(raised.value)
    assert (raised.value.exit_code, raised.value.hint) == (2, problems[0].hint)


@pytest.mark.parametrize(
    ("window", "hint"),
    [
        ('{ from = "8:00", limit = "1M" }', "needs to"),
        ('{ from = "8", to = "9:00", limit = "1M" }', "time of day"),
        ('{ from = "25:00", to = "9:00", limit = "1M" }', "time of day"),
        ('{ from = "8:60", to = "9:00", limit = "1M" }', "time of day"),
        ('{ from = "8:00", to = "8:00", limit = "1M" }', "another time"),
        ('{ from = "24:00", to = "8:00", limit = "1M" }', "23:59"),
        ('{ from = "8:00", to = "9:00", limit = "1M", day = "mon" }', "'day'"),
        ('{ from = "8:00", to = "9:00", limit = "1M", days = "monday" }', "mon-fri"),
        ('{ from = "8:00", to = "9:00", limit = "1M", days = 1 }', "mon-fri"),
        ('{ from = "8:00", to = "9:00", limit = 0 }', "at least 1 byte"),
    ],
)
def test_each_mistake_in_a_window(tmp_path: Path, window: str, hint: str) -> None:
    _, problems = read(written(tmp_path, f"[defaults]\nwindows = [{window}]"))
    assert [(found.key, hint in found.hint) for found in problems] == [("defaults.windows", True)]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "[defaults]\nrpo = 0\njobs = 0\nx = 1\n" + DEVICE)
    assert len(read(path)[1]) == 4
    with pytest.raises(PolicyError, match=r"\(and 3 more: see blktrack config check\)"):
        load(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "blktrack.toml"
    path.write_bytes(b'[defaults]\nrpo = "\xff"')
    assert "is not UTF-8 at byte 18" in str(read(path)[1][0])
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("days", ["fri-mon", "sat,sun,mon,fri", "Fri - Sun, mon"])
def test_days_go_round_the_week(tmp_path: Path, days: str) -> None:
    line = f'windows = [{{ days = "{days}", from = "00:00", to = "24:00", limit = 1 }}]'
    policy = load(written(tmp_path, f"[defaults]\n{line}\n{DEVICE}{REPLICA}"))
    (window,) = next(policy.links).rates.windows
    assert window.days == {0, 4, 5, 6}
    assert all(window.holds(day, minute) for day in window.days for minute in (0, 1439))


def at(day: int, clock: str) -> float:
    """An instant in a week of 2026 by local time; 0 is Monday."""
    hours, minutes = map(int, clock.split(":"))
    return time.mktime((2026, 6, 1 + day, hours, minutes, 0, 0, 0, -1))


def test_the_first_window_that_holds_counts() -> None:
    night = Window(frozenset([4]), 22 * 60, 6 * 60, None)  # from Friday into Saturday
    day = Window(frozenset(range(5)), 8 * 60, 24 * 60, 5)
    rates = Rates(7, (night, day))
    told = {
        (4, "21:59"): 5,
        (4, "22:00"): None,
        (5, "05:59"): None,
        (5, "06:00"): 7,
        (3, "23:59"): 5,
        (4, "00:00"): 7,
        (4, "05:00"): 7,
        (6, "12:00"): 7,
    }
    assert {(d, c): rates.at(at(d, c)) for d, c in told} == told
    assert rates.least == 5
    assert Rates().least is None


def test_a_copy_follows_the_window_it_runs_into() -> None:
    rates = Rates(1000, (Window(frozenset(range(7)), 60, 120, 100), Window(frozenset(), 0, 1, 9)))
    now, wall = 0.0, at(2, "00:59")
    limit = RateLimit(rates, clock=lambda: now, now=lambda: wall)
    assert limit.take(500) == 0
    assert limit.take(500) == pytest.approx(0.5)
    wall = at(2, "01:00")
    assert limit.take(100) == pytest.approx(1.0)
    assert limit.take(0) == pytest.approx(2.0)
    endless = RateLimit(Rates(None, rates.windows), clock=lambda: now, now=lambda: at(2, "03:00"))
    assert [endless.take(10**9) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("thresholds", "told"),
    [
        ("", ["", "", "", ""]),
        ('rpo = "10m"', ["ok", "late", "broken", "broken"]),
        ('rpo-warning = "20m"', ["ok", "ok", "late", "broken"]),
        ('rpo-error = "5m"', ["broken", "broken", "broken", "broken"]),
    ],
)
def test_how_late_a_link_is(tmp_path: Path, thresholds: str, told: list[str]) -> None:
    link = next(load(written(tmp_path, DEVICE + REPLICA + thresholds)).links)
    assert [link.lateness(lag) for lag in (599.0, 600.0, 1200.0, None)] == told


def test_each_key_is_in_the_reference() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for key in DEFAULT_KEYS | DEVICE_KEYS | REPLICA_KEYS:
        assert f"`{key}`" in text, key


def test_the_example_of_the_reference_is_right(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    policy = load(written(tmp_path, example))
    assert len(list(policy.links)) == 3


@pytest.mark.needs("root", "loop")
def test_the_policy_of_a_link_is_found_by_any_name(tmp_path: Path, disks: Disks) -> None:
    disk, other = str(disks.loop(8 * MIB)), str(disks.loop(8 * MIB))
    name = tmp_path / "name"
    name.symlink_to(disk)
    text = f'[device.a]\npath = "{disk}"\n[device.a.replica.r]\ntarget = "{tmp_path}/r.img"\n'
    policy = load(written(tmp_path, text))
    link = next(policy.links)
    assert policy.link(str(name), f"{tmp_path}/x/../r.img") is link
    assert policy.link(disk, f"{tmp_path}/other.img") is None
    assert policy.link(other, f"{tmp_path}/r.img") is None
    assert not same_device("/dev/null", disk)
    assert same_device("/dev/nothing", "/dev/nothing")


@pytest.mark.needs("root", "loop")
def test_what_this_host_would_refuse(tmp_path: Path, disks: Disks) -> None:
    disk = disks.loop(8 * MIB)
    text = f"""
[device.a]
path = "{disk}"
[device.a.replica.gone]
target = "{tmp_path}/no/where.img"
[device.a.replica.itself]
target = "{disk}"
[device.a.replica.off]
target = "{tmp_path}/neither/where.img"
enabled = false
[device.b]
path = "/dev/vg0/away"
[device.b.replica.r]
target = "{tmp_path}/b.img"
"""
    found = check(load(written(tmp_path, text)))
    keys = [problem.key for problem in found]
    assert keys == [
        "device.a.path",
        "device.a.replica.gone.target",
        "device.a.replica.itself.target",
        "device.b.path",
    ]
    assert "another disk after a boot" in found[0].message
    assert all(problem.hint for problem in found), found
    assert stable_name("/dev/null") == ""


@pytest.mark.needs("root", "loop")
def test_two_names_of_one_device(tmp_path: Path, disks: Disks) -> None:
    disk, name = disks.loop(4 * MIB), Path(f"/dev/blktrack-test-{os.getpid()}")
    name.symlink_to(disk)
    disks.held.callback(name.unlink)
    device = '[device.{0}]\npath = "{1}"\n[device.{0}.replica.r]\ntarget = "{2}/{0}.img"\n'
    text = device.format("a", disk, tmp_path) + device.format("b", name, tmp_path)
    found = check(load(written(tmp_path, text)))
    assert ("device.b.path", "is the device of device.a") in [(p.key, p.message) for p in found]


def test_config_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setenv("BLKTRACK_ROOT", str(tmp_path))
    file = Paths.from_environment().policy
    assert main(["config", "check"]) == 2
    assert f"{file} does not exist" in capsys.readouterr().err
    file.parent.mkdir(parents=True)
    file.write_text(WHOLE.replace('"500ms"', "0.5"), encoding="utf-8")
    assert main(["config", "check"]) == 0
    told = capsys.readouterr()
    assert "-> /backup/data.img  crash; late after 1h, broken after 2h; " in told.out
    assert "at most 100 MiB/s, another in 1 window; freezes of 0.5 s at most, 2 hooks" in told.out
    assert "disabled; none; late" in told.out
    assert "in place" in told.out
    assert "warning:" in told.err, "neither device is there"
    assert main(["config", "check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["devices"], report["replicas"]) == (True, 2, 3)
    assert {warning["key"] for warning in report["warnings"]} == {
        "device.data.path",
        "device.logs.path",
    }
    assert main(["config", "check", "--file", str(written(tmp_path, WHOLE))]) == 2
    told = capsys.readouterr()
    assert "defaults.freeze-cap: '500ms' is not valid" in told.err
    assert told.out == ""
    assert main(["config", "check", "--json", "--file", str(tmp_path / "blktrack.toml")]) == 2
    assert json.loads(capsys.readouterr().out)["errors"][0]["key"] == "defaults.freeze-cap"


@pytest.mark.needs("root", "loop", "bpf")
def test_a_sync_does_as_the_policy_says(lab: Lab) -> None:
    """And the command line has the last word."""
    disk = lab.loop(16 * MIB)
    image, log = lab.folder / "r.img", lab.folder / "log"
    policy = lab.store.paths.policy
    policy.parent.mkdir(parents=True)
    policy.write_text(
        f"""
[device.a]
path = "{disk}"
[device.a.replica.r]
target = "{image}"
consistency = "filesystem"
pre-freeze = "echo pre >> {log}"
post-freeze = "echo post >> {log}"
""",
        encoding="utf-8",
    )
    lab.track(disk)
    assert lab.blktrack("sync", disk, image).code == 0
    assert log.read_text(encoding="utf-8").split() == ["pre", "post"]
    done = lab.blktrack("sync", disk, image, "--consistency", "crash", "--no-freeze")
    assert done.code == 0, done.err
    assert log.read_text(encoding="utf-8").split() == ["pre", "post"]
    assert lab.blktrack("sync", disk, lab.folder / "other.img").code == 0
    assert log.read_text(encoding="utf-8").split() == ["pre", "post"]
    policy.write_text("[defaults]\nrpo = 0", encoding="utf-8")
    broken = lab.blktrack("sync", disk, image)
    assert broken.code == 2
    assert f"{policy}: defaults.rpo: 0 is not valid" in broken.err


@pytest.mark.needs("root", "loop", "bpf")
def test_status_tells_what_is_late(lab: Lab) -> None:
    disk, image = lab.loop(4 * MIB), lab.folder / "r.img"
    policy = lab.store.paths.policy
    policy.parent.mkdir(parents=True)
    text = f'[device.a]\npath = "{disk}"\n[device.a.replica.r]\ntarget = "{image}"\n'
    lab.track(disk)
    lab.sync(disk, image)
    told = {}
    for rpo in ("", 'rpo = "1h"', "rpo = 0.001\nrpo-error = 3600", "rpo-error = 0.001"):
        policy.write_text(text + rpo, encoding="utf-8")
        link = lab.blktrack("status", disk, "--json").json["devices"][0]["links"][0]
        told[rpo] = (link["rpo_s"], link["lateness"])
    assert list(told.values()) == [(None, ""), (3600, "ok"), (0.001, "late"), (0.001, "broken")]
    assert "BROKEN: promised 0.001s" in lab.blktrack("status").out
    policy.write_text("x", encoding="utf-8")
    done = lab.blktrack("status", disk, "--json")
    assert done.json["devices"][0]["links"][0]["lateness"] == ""
    assert "warning" in done.err
    assert str(policy) in done.err


def test_a_policy_that_names_no_device_is_warned_of(tmp_path: Path) -> None:
    policy, problems = read(written(tmp_path, "[defaults]\n"))
    assert problems == []
    assert [(found.message, "[device.NAME]" in found.hint) for found in check(policy)] == [
        ("names no device", True)
    ]
