"""What a run with another host is asked for, on the command line and by the policy, and that its
time limit ends it. The keeper of the replicas runs here, over pipes."""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import blktrack.cli.sync
import blktrack.cli.verify
from blktrack.cli import main, parsers
from blktrack.cli.remote import remote_options
from blktrack.errors import BlktrackError
from blktrack.observer import ASKING
from blktrack.options import Options
from blktrack.ship.wire.hello import PATIENCE
from blktrack.units import MIB
from tests.background import assert_clear
from tests.blockdev import TOP, Lab, wait_until
from tests.farside import pipe
from tests.fleets import SIZE, Fleet
from tests.terminal import Terminal
from tests.test_events import filled, identical

on_loop = pytest.mark.needs("root", "loop", "bpf")
LARGE = 24 * MIB  # more than is in flight
FAR = "ssh://vault/backup/a.img"
POLICY = f"""
[defaults]
retry-for = "10m"
compress = 3

[device.a]
path = "/dev/vg0/a"

[device.a.replica.far]
target = "{FAR}"
peer-timeout = "1m"
time-limit = "5m"
"""


@pytest.mark.parametrize("command", ["sync", "verify"])
@pytest.mark.parametrize(
    ("word", "value", "why"),
    [
        ("--compress", "20", "neither none nor adapt"),
        ("--compress", "0", "neither none nor adapt"),
        ("--compress", "best", "no level from 1 to 19"),
        ("--peer-timeout", "0.5", "from 1s to 1h"),
        ("--peer-timeout", "2h", "from 1s to 1h"),
        ("--time-limit", "0", "no time at all"),
        ("--time-limit", "soon", "not a duration"),
        ("--retry-for", "soon", "not a duration"),
    ],
)
def test_values_that_make_no_sense(
    command: str, word: str, value: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "/dev/vg0/a", FAR, word, value]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"blktrack {command}: ") and word in said and why in said


@pytest.mark.needs("root")
@pytest.mark.parametrize("word", ["--retry-for", "--compress", "--peer-timeout"])
@pytest.mark.parametrize("command", ["sync", "verify"])
def test_no_other_host_is_meant(
    command: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "/dev/vg0/a", "/backup/a.img", word, "5"]) == 2
    said = capsys.readouterr().err
    assert f"{word} is for a replica on another host, and /backup/a.img is on this one" in said


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Options]]:
    """With the policy above, the options of each run, which does no more."""
    monkeypatch.setenv("BLKTRACK_ROOT", str(tmp_path))
    file = tmp_path / "etc/blktrack/blktrack.toml"
    file.parent.mkdir(parents=True)
    file.write_text(POLICY, encoding="utf-8")
    found: list[Options] = []

    def run(store: Any, device: str, target: str, options: Options, observer: Any) -> None:
        found.append(options)
        raise BlktrackError("no further")

    monkeypatch.setattr(blktrack.cli.sync, "sync", run)
    monkeypatch.setattr(blktrack.cli.verify, "verify", run)
    yield found


@pytest.mark.needs("root")
def test_the_command_line_goes_over_the_policy(asked: list[Options]) -> None:
    def options(*words: str) -> tuple[Any, ...]:
        assert main([*words, "--quiet"]) == 1
        found = asked[-1]
        return found.retry_for, found.compress, found.patience, found.time_limit

    assert options("sync", "/dev/vg0/a", FAR) == (600, 3, 60, 300)
    assert options("verify", "/dev/vg0/a", FAR) == (600, 3, 60, None)
    # As the policy's, however it is written; any other is not the policy's.
    assert options("sync", "/dev/vg0/a", "SSH://vault//backup/./a.img") == (600, 3, 60, 300)
    assert options("sync", "/dev/vg0/a", f"{FAR}2") == (60, "adapt", PATIENCE, None)
    words = ("--retry-for", "0", "--compress", "none", "--peer-timeout", "5", "--time-limit", "1m")
    for command in ("sync", "verify"):
        assert options(command, "/dev/vg0/a", FAR, *words) == (0, "none", 5, 60)
    assert options("sync", "/dev/vg0/a", FAR, "--compress", "adapt")[1] == "adapt"
    assert options("sync", "/dev/vg0/a", "/backup/a.img", "--time-limit", "1.5m")[3] == 90


def test_whether_ssh_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody is there, and only of one replica at a time."""
    parser = parsers().subparsers["sync"]
    main_end, other_end = pty.openpty()
    with os.fdopen(main_end, "rb"), os.fdopen(other_end, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("sys.stderr", terminal)

        def may(*words: str, target: str | None = FAR) -> bool:
            options = Options()
            remote_options(parser.parse_args(["/dev/vg0/a", FAR, *words]), options, target)
            return options.interactive

        assert may() and not may("--quiet") and not may(target=None)
        monkeypatch.setattr("sys.stdin", None)  # as Python has it where it is closed
        assert not may()
        with open(os.devnull, encoding="ascii") as nobody:
            monkeypatch.setattr("sys.stdin", nobody)
            assert not may()


@on_loop
@pytest.mark.parametrize("asks", [False, True])
def test_nothing_is_written_while_ssh_may_ask(
    shared: Lab, monkeypatch: pytest.MonkeyPatch, *, asks: bool
) -> None:
    from blktrack.ship.address import Address
    from blktrack.ship.diagnosis import ConnectionFailed
    from blktrack.ship.remote import RemoteReplica, Wire
    from blktrack.sysfs import BlockDevice
    from tests.test_progress import Phases

    source, phases = BlockDevice.find(shared.loop(SIZE)), Phases()
    options = Options()
    monkeypatch.setenv("BLKTRACK_SSH", "/bin/false")
    with pytest.raises(ConnectionFailed):
        RemoteReplica.open(
            Address.parse(FAR),
            source=source,
            link=None,
            wire=Wire(interactive=asks),
            stop=options.stop,
            observer=phases,
        )
    assert phases.names == [ASKING if asks else "connecting to vault"]


def far_of(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    far = lab.name("far")
    far.mkdir()
    monkeypatch.setenv("BLKTRACK_SSH", pipe(far))
    return far


@on_loop
def test_a_run_ends_with_its_time(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it has brought there is not brought again."""
    replica = far_of(shared, monkeypatch) / "replica.img"
    device, target = filled(shared, LARGE), f"ssh://vault{replica}"
    shared.track(device)
    slow = ("--limit", "256K", "--compress", "none", "--time-limit", "2")
    done = shared.blktrack("sync", device, target, *slow)
    assert_clear(done, 4, "was interrupted: its time limit of 2s is over", "run it again to go on")
    done = shared.blktrack("sync", device, target)
    assert done.code == 0 and identical(device, replica)
    done = shared.blktrack("verify", device, target, "--limit", "1K", "--time-limit", "0.5")
    assert_clear(done, 4, "its time limit of 0.5s is over")


@on_loop
def test_all_of_them_end_with_their_time(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, far = Fleet(shared), far_of(shared, monkeypatch)
    for name in ("one", "two"):
        path = filled(shared, LARGE) if name == "one" else ""
        disk = fleet.add(name, ("far", "near"), path=path, limit='"256K"')
        disk.of_replica["far"] = {"compress": '"none"'}
        disk.replicas["far"] = f"ssh://vault{far}/{name}.img"  # type: ignore[assignment]
    fleet.write()
    done = fleet.sync("--time-limit", "4", "--jobs", "1", "--quiet")
    assert done.code == 4
    assert "one.far: initial of" in done.err and "its time limit of 4s is over" in done.err
    for name in ("one.near", "two.far", "two.near"):
        assert f"{name}: it was not begun: the time limit of 4s was over\n" in done.err
    assert fleet.sync("--limit", "none", "--quiet").code == 0
    for name, disk in fleet.disks.items():
        assert identical(disk.path, far / f"{name}.img") and fleet.in_step(name)


@on_loop
def test_the_limit_of_a_replica_holds_within_that_of_all(shared: Lab) -> None:
    fleet = Fleet(shared)
    fleet.add("one", limit='"256K"', time_limit='"1s"')
    fleet.write()
    done = fleet.sync("--time-limit", "1h", "--quiet")
    assert done.code == 4 and "its time limit of 1s is over" in done.err


@on_loop
def test_it_is_compressed_as_it_is_asked_for(shared: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = far_of(shared, monkeypatch) / "replica.img"
    device, target = filled(shared, LARGE), f"ssh://vault{replica}"
    shared.track(device)
    wire = {}
    for level in ("none", "1", "12", "adapt"):
        done = shared.blktrack("sync", device, target, "--full", "--compress", level, "--json")
        assert (done.json["mode"], done.json["bytes_shipped"]) == ("initial", LARGE)
        wire[level] = done.json["bytes_wire"]
        assert identical(device, replica)
    assert wire["12"] < wire["1"] < LARGE < wire["none"]
    assert wire["adapt"] < LARGE


@on_loop
def test_a_question_of_ssh_on_the_terminal(shared: Lab) -> None:
    """On a line of its own, where no bar is drawn over it; what follows is drawn again."""
    device, asking = filled(shared, SIZE), shared.name("ssh")
    shared.track(device)
    asking.write_text(
        '#!/bin/sh\nfor word; do [ "$word" != -G ] || exit 0; done\n'
        f"if [ ! -e {asking}.asked ]; then touch {asking}.asked; sleep 1; exit 255; fi\n"
        "printf 'passphrase: ' >/dev/tty; read answer </dev/tty\n"
        "echo Permission denied: $answer >&2; exit 255\n"
    )
    asking.chmod(0o755)
    words = ["sync", device, FAR, "--retry-for", "4"]
    env = {"BLKTRACK_SSH": str(asking), "PYTHONPATH": str(TOP)}
    with Terminal([sys.executable, "-m", "blktrack", *words], env=env) as terminal:
        terminal.until("trying again: cannot connect to vault")
        terminal.until("passphrase: ")
        asked = len(terminal.screen)
        assert re.search(r"\x1b\[2K(\x1b\[\?25h|\s)*passphrase: $", terminal.screen)
        with pytest.raises(AssertionError, match="more did not come"):  # until somebody answers
            wait_until(lambda: terminal.read() and len(terminal.screen) > asked, "more", 1.0)
        terminal.send("secret\n")
        terminal.until("Permission denied: secret")
        assert terminal.end() == 1
