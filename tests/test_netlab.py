"""The network that tests of replicas on another host run on does what they ask of it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests import netns
from tests.blockdev import TOP, run, wait_until
from tests.netlab import NetLab
from tests.netns import FAR
from tests.sshd import UNPRIVILEGED

pytestmark = pytest.mark.needs("netns", "sshd")

# Answers each line; tells what it is called by.
ECHO = ["sh", "-c", 'echo "for $SSH_ORIGINAL_COMMAND"; while read x; do echo "$x"; done; exit 7']


class Talk:
    """An ssh in the background whose command, ECHO, runs by now."""

    def __init__(self, net: NetLab) -> None:
        net.sshd.allow(ECHO)
        pipe = subprocess.PIPE
        self.process = net.start_ssh("me", stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.stderr = self.process.stderr
        assert self.stdout.readline() == "for me\n", self.process.communicate()

    def say(self, line: str) -> None:
        self.stdin.write(f"{line}\n")
        self.stdin.flush()

    def is_silent(self) -> bool:
        return self.process.poll() is None and not select.select([self.stdout], [], [], 0)[0]


def test_the_forced_command_runs_whatever_is_asked(net: NetLab) -> None:
    net.sshd.allow(ECHO)
    done = net.ssh("rm", "-rf", "/", input="one\ntwo\n")
    assert (done.returncode, done.stdout) == (7, "for rm -rf /\none\ntwo\n"), done
    net.sshd.allow(["printf", "%s|", "a b", "it's", '"quoted"', "$HOME"])
    assert net.ssh().stdout == """a b|it's|"quoted"|$HOME|"""
    net.sshd.allow(None)
    assert net.ssh("echo", "free").stdout == "free\n"


def test_the_far_side_has_a_place_of_its_own_and_our_sources(net: NetLab, tmp_path: Path) -> None:
    net.sshd.allow([sys.executable, "-c", "import blktrack, os; print(blktrack.__file__)"])
    assert net.ssh().stdout == f"{TOP}/blktrack/__init__.py\n"
    net.sshd.allow(["printenv", "BLKTRACK_ROOT"])
    assert net.ssh().stdout == f"{net.folder}/far-root\n"
    (tmp_path / ".bashrc").write_text("echo read\n")
    with NetLab(far_env={"BLKTRACK_ROOT": "/x y", "HOME": str(tmp_path)}) as other:
        other.sshd.allow(["sh", "-c", 'echo "$BLKTRACK_ROOT, $HOME"'])
        assert other.ssh().stdout == f"/x y, {tmp_path}\n"


def test_both_sides_see_the_mounts_of_the_host(net: NetLab) -> None:
    here = os.readlink("/proc/self/ns/mnt")
    net.sshd.allow(["readlink", "/proc/self/ns/mnt"])
    assert net.near.run(["readlink", "/proc/self/ns/mnt"]).stdout.strip() == here
    assert net.ssh().stdout.strip() == here


def test_a_command_that_is_not_root(net: NetLab) -> None:
    net.sshd.allow([*UNPRIVILEGED, "id", "--user"])
    assert net.ssh().stdout == "65534\n"


def test_the_ssh_of_the_environment_runs_from_anywhere(net: NetLab) -> None:
    net.sshd.allow(["echo", "here"])
    command = [*net.environment["BLKTRACK_SSH"].split(), FAR]
    assert run(*command) == "here"
    assert net.near.run(command).stdout == "here\n"


def test_only_who_knows_and_is_known_gets_in(net: NetLab) -> None:
    net.sshd.allow(ECHO)
    for options, says in (
        ({"host_key": "other_host_key"}, "REMOTE HOST IDENTIFICATION HAS CHANGED"),
        ({"host_key": "", "strict": False}, "Host key verification failed"),
        ({"host_key": ""}, "Host key verification failed"),
        ({"key": "other_client_key"}, "Permission denied (publickey)"),
    ):
        done = net.ssh(client=net.sshd.client(**options))
        assert (done.returncode, done.stdout) == (255, "")
        assert says in done.stderr, done.stderr
    net.sshd.allow_nobody()
    assert "Permission denied" in net.ssh().stderr


def test_a_cable_pulled_and_plugged_in_again(net: NetLab) -> None:
    talk = Talk(net)
    net.link_down()
    talk.say("late")
    with net.near.network() as network:
        (cable,) = network.get_links(ifname="near0")
        assert not cable.get_attr("IFLA_CARRIER")
    done = net.near.run(["ssh", "-o", "ConnectTimeout=1", *net.sshd.client().split()[1:], FAR])
    assert done.returncode == 255 and "timed out" in done.stderr, done
    assert talk.is_silent()
    net.link_up()
    assert talk.stdout.readline() == "late\n"
    talk.stdin.close()
    assert talk.process.wait(30) == 7


def test_routes_that_are_not_there(net: NetLab) -> None:
    net.unreachable()
    assert "No route to host" in net.ssh().stderr
    net.reachable()
    assert net.ssh().returncode != 255
    net.interface_down()
    assert "Network is unreachable" in net.ssh().stderr
    net.link_up()
    assert net.ssh().returncode != 255


def test_the_far_command_is_killed_alone(net: NetLab) -> None:
    by_hand = net.far.start(["sleep", "1000"])
    talk = Talk(net)
    assert net.sshd.kill_commands()
    assert talk.process.wait(30) == 255  # ssh's own, as for a command that a signal ended
    assert net.sshd.commands() == set()
    assert by_hand.poll() is None
    assert net.ssh(input="").returncode == 7


def test_the_server_is_killed_and_comes_back(net: NetLab) -> None:
    talk = Talk(net)
    net.sshd.kill()
    assert talk.process.wait(30) == 255
    assert "closed by remote host" in talk.stderr.read()
    assert "Connection refused" in net.ssh().stderr
    net.sshd.start()
    assert net.ssh(input="").returncode == 7


def test_nothing_is_left_even_if_the_body_raises() -> None:
    with pytest.raises(ZeroDivisionError), NetLab() as net:
        talk = Talk(net)
        net.sshd.allow(["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
        net.start_ssh()
        wait_until(lambda: len(net.sshd.commands()) >= 3, "a second command, of two processes")
        pids = net.near.processes() | net.far.processes()
        raise ZeroDivisionError
    assert talk.process.returncode is not None  # it was waited for
    assert len(pids) >= 8  # two ssh, three sshd, three of commands
    wait_until(lambda: not any(map(netns.runs, pids)), "the end of what it ran")
    assert netns.leftovers(os.getpid()) == []


DIES = """
import sys
from tests.netlab import NetLab
net = NetLab().__enter__()
net.sshd.allow(["sleep", "1000"])
net.start_ssh()
while not net.sshd.commands():
    pass
print(*net.near.processes() | net.far.processes(), flush=True)
sys.stdin.read()
"""


def test_the_next_lab_tidies_up_after_a_killed_process() -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", DIES], cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with killed:
        assert killed.stdout is not None
        pids = [int(word) for word in killed.stdout.readline().split()]
        assert len(pids) >= 4
        netns.sweep()  # it lives
        assert all(map(netns.runs, pids))
        killed.kill()
    assert len(netns.leftovers(killed.pid)) == 3
    with NetLab():
        pass
    assert netns.leftovers(killed.pid) == []
    wait_until(lambda: not any(map(netns.runs, pids)), "the end of what it ran")
