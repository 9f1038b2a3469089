"""Schedules: what is installed, and what cron makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blktrack.errors import UsageError
from blktrack.schedule import Instance, cron, timer
from blktrack.units import KIB
from tests import sectors
from tests.background import TRACEBACK, assert_clear
from tests.blockdev import TOP, Done, Lab, read_image, run, wait_until, write_direct
from tests.fleets import SIZE, Fleet, children
from tests.namespace import Namespace
from tests.oracle import repeating

HOST = Instance("blktrack", Path("/usr/bin/blktrack"))
CRON, UNITS = str(cron.WHERE), str(timer.WHERE)


@pytest.mark.parametrize(
    ("every", "fields"),
    [
        (60, "* * * * *"),
        (300, "*/5 * * * *"),
        (1800, "*/30 * * * *"),
        (3600, "0 * * * *"),
        (6 * 3600, "0 */6 * * *"),
        (86400, "0 0 * * *"),
    ],
)
def test_what_cron_can_say(every: float, fields: str) -> None:
    assert cron.times(every) == fields


@pytest.mark.parametrize("every", [0.0, 30.0, 90.0, 420.0, 2700.0, 5400.0, 5 * 3600, 2 * 86400])
def test_what_cron_cannot_say(every: float) -> None:
    with pytest.raises(UsageError, match="evenly"):
        cron.times(every)


def test_names_that_a_shell_and_cron_would_take_apart() -> None:
    """cron ends a line at a percent sign, whatever quotes are around it."""
    odd = Instance("blktrack-1", Path("/opt/100% new/blktrack"), Path("/srv/it's"))
    (file,) = cron.listed(odd, 300)
    line = file.text.splitlines()[-1]
    assert line.endswith(
        r"""  root  BLKTRACK_ROOT='/srv/it'"'"'s' '/opt/100\% new/blktrack' """
        "sync --all --quiet --remind 4h"
    )
    shell = line.partition("root  ")[2].replace(r"\%", "%").replace("sync", "$BLKTRACK_ROOT")
    words = run("sh", "-c", f"printf '%s|' {shell.partition(' ')[2]}")
    assert words.startswith("/opt/100% new/blktrack|")
    assert "." not in file.path.name and file.text.endswith("\n")


@dataclass
class Installed:
    """Something to schedule, where /etc/cron.d and /etc/systemd/system are empty and our own."""

    fleet: Fleet
    inside: Namespace

    @property
    def name(self) -> str:
        return self.fleet.lab.store.paths.pins.name

    def install(self, *words: str) -> Done:
        return self.inside.blktrack("install", *words)


@pytest.fixture
def host(lab: Lab) -> Installed:
    fleet = Fleet(lab)
    fleet.add("one", path="/dev/blktrack-test-is-away")
    fleet.write()
    script = f"""
        for folder in {CRON} {UNITS}; do mount -t tmpfs none $folder; done
        # No manager runs there, whatever does outside.
        [ ! -d /run/systemd ] || mount -t tmpfs none /run/systemd
        echo ready
        exec cat
    """
    return Installed(fleet, Namespace(lab, script))


on_host = pytest.mark.needs("root", "cron", "systemd")


@on_host
def test_cron_is_installed_and_taken_back(host: Installed) -> None:
    file = f"{CRON}/{host.name}"
    done = host.install("cron")
    assert (done.code, done.out, done.err) == (0, f"{file}: written\n", "")
    assert host.inside.run("stat", "-c", "%a %U %F", file).out == "644 root regular file\n"
    text = host.inside.read(file)
    assert text.endswith(" sync --all --quiet --remind 4h\n") and "\n#MAILTO=root\n" in text
    assert f"\n{host.install('cron', '--print').out}".count(text) == 1
    assert host.install("cron") == Done(0, "it is as installed\n", "")
    host.inside.run("sed", "-i", "s/^#MAILTO=root/MAILTO=ops@example.net/", file)
    assert host.install("cron", "--every", "10m").out == f"{file}: written\n"
    text = host.inside.read(file)
    assert "\n*/10 * * * *  root  " in text and "\nMAILTO=ops@example.net\n" in text
    assert host.install("cron", "--remove").out == f"{file}: removed\n"
    assert host.install("cron", "--remove") == Done(0, "nothing was installed\n", "")
    assert host.inside.files(CRON, UNITS) == set()


@on_host
def test_systemd_is_installed_and_taken_back(host: Installed) -> None:
    """In a chroot or an image, where no manager runs."""
    service, timed = (f"{UNITS}/{host.name}-sync.{kind}" for kind in ("service", "timer"))
    link = f"{UNITS}/timers.target.wants/{host.name}-sync.timer"
    done = host.install("systemd", "--every", "7m")
    assert (done.code, done.err) == (0, "")
    assert done.out == "".join(f"{path}: written\n" for path in (service, timed, link))
    assert host.inside.files(CRON, UNITS) == {service, timed, link}
    assert host.inside.run("readlink", link).out == f"{timed}\n"
    assert "OnUnitActiveSec=420s\n" in host.inside.read(timed)
    assert host.install("systemd", "--every", "7m") == Done(0, "it is as installed\n", "")
    for gone in (service, timed, link):
        host.inside.run("rm", gone)
        assert host.install("systemd", "--remove").code == 0, f"without {gone}"
        assert host.inside.files(CRON, UNITS) == set()
        assert host.install("systemd", "--every", "7m").code == 0
    assert host.install("systemd", "--remove").out.count("removed") == 3
    assert host.install("systemd", "--remove").out == "nothing was installed\n"


@on_host
def test_an_etc_that_does_not_take_it(lab: Lab) -> None:
    """The host's own schedule, with an /etc that is a copy and ours."""
    etc = lab.name("etc")
    etc.mkdir()
    script = f"""
        mount -t tmpfs none {etc}
        cp -a /etc/. {etc}
        mount --bind {etc} /etc
        mkdir -p /etc/blktrack
        rm -rf /etc/cron.d
        echo ready
        exec cat
    """
    host = Namespace(lab, script)
    fleet = Fleet(lab)
    fleet.add("one", path="/dev/blktrack-test-is-away")
    fleet.write()
    host.run("cp", fleet.policy, "/etc/blktrack/blktrack.toml")
    install = ("env", "-u", "BLKTRACK_ROOT", sys.executable, "-m", "blktrack", "install", "cron")
    assert_clear(host.run(*install), 1, f"this host has no {CRON}", "install it")
    host.run("mkdir", CRON)
    done = host.run(*install)
    assert (done.code, done.out) == (0, f"{CRON}/blktrack: written\n")
    assert "over a boot tracking goes on only with blktrack service install" in done.err
    host.run("mount", "-o", "remount,bind,ro", "/etc")
    assert_clear(host.run(*install, "--remove"), 1, "cannot remove", "Read-only file system")
    host.run("mount", "-o", "remount,bind,rw", "/etc")
    host.run("rm", f"{CRON}/blktrack")
    host.run("mkdir", f"{CRON}/blktrack")
    assert_clear(host.run(*install, "--remove"), 1, "cannot read", "Is a directory", "what it is")


@on_host
def test_both_at_once_are_refused(host: Installed) -> None:
    for one, other in (("cron", "systemd"), ("systemd", "cron")):
        assert host.install(one).code == 0
        done = host.install(other)
        assert done.code == 1 and f"blktrack install {one} --remove" in done.err
        assert host.install(one, "--remove").code == 0


@on_host
def test_a_policy_that_cannot_be_followed_is_not_scheduled(host: Installed) -> None:
    host.fleet.write("[device.a]\npath = 3\n")
    for kind in ("cron", "systemd"):
        done = host.install(kind)
        assert done.code == 2 and "device.a.path" in done.err, done
    host.fleet.policy.unlink()
    done = host.install("cron")
    assert done.code == 2 and "does not exist" in done.err and "config check" in done.err
    assert host.install("cron", "--print").code == 0, "it shows what would be"
    assert host.install("cron", "--every", "7m").code == 2
    assert host.install("systemd", "--every", "5s").code == 2
    assert host.inside.files(CRON, UNITS) == set()


@on_host
def test_what_others_wrote_is_left_alone(host: Installed) -> None:
    file = f"{CRON}/{host.name}"
    host.inside.run("sh", "-c", f"echo mine > {file}")
    for words in (("cron",), ("cron", "--remove")):
        done = host.install(*words)
        assert done.code == 1 and "was not written by blktrack" in done.err
    assert host.inside.read(file) == "mine\n"


@pytest.mark.needs("systemd")
@pytest.mark.parametrize("root", [None, Path('/srv/100% of it\'s "own"')])
def test_systemd_has_no_complaint(tmp_path: Path, root: Path | None) -> None:
    own = Instance("blktrack", Path(sys.executable).with_name("blktrack"), root)
    for file in timer.listed(own, 300):
        (tmp_path / file.path.name).write_text(file.text)
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    units = sorted(str(path) for path in tmp_path.iterdir())
    command = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    loud = {**environment, "SYSTEMD_LOG_LEVEL": "debug"}
    dump = subprocess.run(command, capture_output=True, text=True, env=loud, check=True).stdout
    assert "KillMode: process" in dump and "OOMPolicy: continue" in dump
    assert re.search(r"After: blktrack\.service", dump)
    if root is not None:
        assert f"BLKTRACK_ROOT={root}" in dump


PACE = 10  # minutes of the daemon in one


class Cron:
    """The daemon, with tables, spool and pid file of its own, and a mailer that keeps the mails.

    It wakes at each full minute, of a clock that is the daemon's alone and goes faster: it gives
    what it runs an environment of its own, and so the clock of the host.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.mails, sbin = lab.name("mails"), lab.name("sbin")
        for folder in (self.mails, sbin):
            folder.mkdir()
        mailer = sbin / "sendmail"
        mailer.write_text(f"#!/bin/sh\nexec cat > $(mktemp {self.mails}/XXXXXX)\n")
        mailer.chmod(0o755)
        script = f"""
            for folder in {CRON} /var/spool/cron /run; do mount -t tmpfs none $folder; done
            mkdir -m 1730 /var/spool/cron/crontabs
            mount -t overlay -o lowerdir={sbin}:/usr/sbin overlay /usr/sbin
            # libfaketime leaves files in /dev/shm, of names that another daemon's has as well.
            mount --bind {lab.folder} /mnt && mount -t tmpfs none /dev/shm
            mkdir -p {lab.folder} && mount --move /mnt {lab.folder}
            echo ready
            read go
            export LD_PRELOAD=$(echo /usr/lib/*/faketime/libfaketime.so.1) FAKETIME="+0 x{PACE}"
            NO_FAKE_STAT=1 FAKETIME_DONT_FAKE_MONOTONIC=1 exec cron -f
        """
        self.inside = Namespace(lab, script, ("--pid", "--fork", "--kill-child", "--mount-proc"))

    def start(self) -> None:
        assert self.inside.process.stdin is not None
        self.inside.process.stdin.write("go\n")
        self.inside.process.stdin.flush()
        wait_until(lambda: self._name() == "cron", "the start of cron")

    @property
    def pid(self) -> int:
        (own,) = children(self.inside.process.pid)
        return own

    def _name(self) -> str:
        return Path(f"/proc/{self.pid}/comm").read_text(encoding="ascii").strip()

    def until_idle(self) -> None:
        """Until it has handed over the mail of all that ran."""
        wait_until(lambda: not children(self.pid), "the end of cron's jobs")

    @property
    def mail(self) -> list[str]:
        return [path.read_text() for path in sorted(self.mails.iterdir())]


class Minutes:
    """The runs of a schedule, one after the other."""

    def __init__(self, fleet: Fleet, daemon: Cron) -> None:
        self.fleet, self.daemon = fleet, daemon
        self._note = fleet.lab.store.paths.run / "all/one.near.lock"
        self._last = self._begun()

    def _begun(self) -> float:
        try:
            return float(json.loads(self._note.read_text())["time"])
        except (FileNotFoundError, ValueError):  # it may just be written
            return 0.0

    def next_run(self) -> list[str]:
        """All mails there are after the next run has ended."""
        wait_until(lambda: self._begun() > self._last, "a run", patience=90)
        self._last = self._begun()
        self.daemon.until_idle()
        return self.daemon.mail

    def points(self) -> dict[str, Any]:
        """The newest point of each replica, by target."""
        told = json.loads(self.fleet.lab.blktrack("status", "--json").out)
        return {link["target"]: link["point"] for dev in told["devices"] for link in dev["links"]}


@pytest.fixture
def daemon(lab: Lab) -> Iterator[Cron]:
    made = Cron(lab)
    yield made
    made.inside._end()


def one_schedule(lab: Lab, daemon: Cron, rounds: int) -> None:
    fleet = Fleet(lab)
    fleet.add("one", ("near", "far"))
    fleet.add("two")
    fleet.defaults = {"rpo": '"10m"'}
    fleet.write()
    assert fleet.sync("--quiet") == Done(0, "", "")
    single = lab.loop(SIZE)
    lab.track(single)
    by_line = lab.name("single")
    assert daemon.inside.blktrack("install", "cron", "--every", "1m").code == 0
    _readme_line(daemon, single, by_line)
    count, pause = 0, threading.Event()

    def write() -> None:
        nonlocal count
        count += 1
        fleet.change(count)
        pause.wait(0.3)  # a source that is always written faster than it is read has no point

    minutes = Minutes(fleet, daemon)
    broken, two = fleet.disks["one"].replicas["far"], fleet.disks["two"].replicas["near"]
    with repeating(write):
        before = minutes.points()
        daemon.start()
        for _ in range(rounds):
            assert minutes.next_run() == []
            after = minutes.points()
            assert all(after[target] > point for target, point in before.items() if point)
            before = after

        kept = broken.read_bytes()
        broken.write_bytes(b"precious")
        shelf = lab.name("shelf")
        Path(f"{broken}.blktrack").rename(shelf)
        for _ in range(2 * rounds):
            (mail,) = minutes.next_run()
        after = minutes.points()
        assert after[str(two)] > before[str(two)]
        assert broken.read_bytes() == b"precious"
        _check(mail, broken)

        shelf.rename(f"{broken}.blktrack")
        broken.write_bytes(kept)
        for _ in range(rounds):
            assert minutes.next_run() == [mail]
        before, after = after, minutes.points()
        assert all(after[str(target)] > before[str(target)] for target in (broken, two))
    assert fleet.sync("--quiet") == Done(0, "", "")
    for name, disk in fleet.disks.items():
        assert all(fleet.in_step(name, each) for each in disk.replicas)
    assert not sectors.faults(read_image(single), read_image(by_line))


def _readme_line(daemon: Cron, device: str, target: Path) -> None:
    """The line that the README prints for one replica: every minute, and with names from here."""
    write_direct(device, 0, sectors.make(0, 64 * KIB, 1))
    text = (TOP / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^ *(\*/5 .* root .*/blktrack sync .*)$", text, re.MULTILINE)
    assert found, "the README has no line for cron"
    fields = re.fullmatch(r"\*/5( \* \* \* \* +root +)\S+( sync )\S+ \S+(.*)", found[1])
    assert fields, found[1]
    command = Path(sys.executable).with_name("blktrack")
    root = os.environ["BLKTRACK_ROOT"]
    line = f"*{fields[1]}BLKTRACK_ROOT={root} {command}{fields[2]}{device} {target}{fields[3]}"
    done = daemon.inside.run("sh", "-c", f"echo '{line}' > {CRON}/single")
    assert done.code == 0


def _check(mail: str, broken: Path) -> None:
    """One who reads it knows what to do."""
    head, _, body = mail.partition("\n\n")
    assert re.search(r"^Subject: Cron <root@.*> .*sync --all --quiet", head, re.MULTILINE), head
    assert TRACEBACK not in body and "\x1b" not in body
    first, what, hint, since, well = body.strip().splitlines()
    assert "1 of 3 replicas" in first
    assert what.startswith("one.far: ") and hint.startswith("  -> ")
    assert str(broken) in since and "last point 20" in since
    assert well == "Well: one.near, two.near"


@pytest.mark.needs("root", "loop", "bpf", "cron", "faketime")
def test_cron_runs_what_is_installed(lab: Lab, daemon: Cron) -> None:
    """Advances, one mail for a replica that is broken by hand, recovery without a word."""
    one_schedule(lab, daemon, 1)


@pytest.mark.soak
@pytest.mark.needs("root", "loop", "bpf", "cron", "faketime")
def test_cron_for_a_while(lab: Lab, daemon: Cron) -> None:
    one_schedule(lab, daemon, 4)
