"""A host that only receives: no bcc, no rich, no pyroute2, and a plain user where it is a file."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack.bpf import kernel
from blktrack.cli import main
from blktrack.config import Paths
from tests.blockdev import TOP, Done, Lab, read_image, write_direct
from tests.jails import FILL, SIZE, Grounds, full, increment
from tests.loopdev import Disks
from tests.streams import Hosts
from tests.test_events import filled

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
NEEDED = ("numpy", "numpy.libs", "xxhash", "zstandard")
ABSENT = ("bcc", "pyroute2", "rich")


class Receiver:
    """A Python with what a receiver needs and nothing else, and a folder of a plain user's."""

    def __init__(self, top: Path) -> None:
        self.folder = top / "replicas"
        self._python = top / "venv/bin/python"
        venv = ("-m", "venv", "--without-pip", top / "venv")
        subprocess.run([getattr(sys, "_base_executable"), *venv], check=True)  # noqa: B009
        (site,) = top.glob("venv/lib/python3*/site-packages")
        packages = Path(sysconfig.get_path("purelib"))
        for name in NEEDED:
            if (packages / name).exists():  # numpy.libs: not where numpy was built here
                (site / name).symlink_to(packages / name)
        (site / "blktrack.pth").write_text(str(TOP), encoding="utf-8")
        self.folder.mkdir()
        top.chmod(0o755)
        os.chown(self.folder, 65534, 65534)

    def command(self, user: tuple[str, ...] = NOBODY) -> list[str]:
        return [*user, str(self._python)]

    def run(
        self,
        *words: str | Path,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
        user: tuple[str, ...] = NOBODY,
    ) -> Done:
        done = subprocess.run(
            [*self.command(user), *words],
            input=stdin,
            capture_output=True,
            check=False,
            cwd="/",
            timeout=120,
            env={**os.environ, **(env or {})},
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def blktrack(self, *words: str | Path, stdin: bytes = b"", **env: str) -> Done:
        return self.run("-m", "blktrack", *words, stdin=stdin, env=env)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with contextlib.ExitStack() as stack:
        # Not pytest's folder, which is root's alone.
        top = Path(tempfile.mkdtemp(prefix="blktrack-receiver-", dir="/var/tmp"))
        stack.callback(shutil.rmtree, top)
        yield Receiver(top)


@pytest.fixture
def grounds(receiver: Receiver, tmp_path: Path) -> Iterator[Grounds]:
    """In the plain user's folder."""
    top = receiver.folder / tmp_path.name
    yield Grounds(top)
    shutil.rmtree(top)


@pytest.mark.needs("root")
@pytest.mark.parametrize("name", ABSENT)
def test_it_has_no_more_than_it_needs(receiver: Receiver, name: str) -> None:
    done = receiver.run("-c", f"import os; print(os.geteuid()); import {name}")
    assert (done.code, done.out) == (1, "65534\n") and "ModuleNotFoundError" in done.err


@pytest.mark.needs("root", "loop", "bpf")
def test_send_to_recv_as_a_plain_user(shared: Lab, receiver: Receiver) -> None:
    replica = receiver.folder / "sent.img"
    hosts = Hosts(shared, SIZE, target=replica)
    for mode in ("initial", "incremental"):
        delta, report = hosts.sent()
        done = receiver.blktrack("recv", replica, "--json", stdin=delta)
        assert done.code == 0, done.err
        assert (done.json["mode"], done.json["epoch"]) == (mode, report.epoch)
        hosts.commit(report.epoch)
        assert hosts.identical()
        hosts.change(SIZE // 2)
    info = replica.stat()
    assert (info.st_uid, info.st_mode & 0o777) == (65534, 0o600)
    assert list(Path(f"{replica}.blktrack").iterdir()) == [Path(f"{replica}.blktrack/replica.json")]


@pytest.mark.needs("root")
def test_restricted_as_a_plain_user(receiver: Receiver, grounds: Grounds) -> None:
    os.chown(grounds.folder, 65534, 65534)
    asked = {"SSH_ORIGINAL_COMMAND": "blktrack recv x.img"}
    restricted = ("recv", "--restrict", grounds.folder, "--quiet")
    for delta in (full(), increment(data=[(4096, 4096)])):
        done = receiver.blktrack(*restricted, stdin=delta, **asked)
        assert (done.code, done.out, done.err) == (0, "", "")
    assert (grounds.folder / "x.img").read_bytes() == 2 * FILL + bytes(SIZE - 8192)
    os.chown(grounds.folder / "x.img.blktrack", 0, 0)
    (grounds.folder / "x.img.blktrack").chmod(0o700)
    done = receiver.blktrack(*restricted, stdin=full(), **asked)
    assert done.code == 1 and "x.img.blktrack, cannot be read: Permission denied" in done.err
    before = grounds.seen()
    done = receiver.blktrack("recv", grounds.folder / "sub/y.img", stdin=full())
    assert done.code == 1 and "Permission denied" in done.err and "\n  -> " in done.err
    assert grounds.seen() == before


@pytest.mark.needs("root", "loop")
def test_a_device_that_the_plain_user_may_write(
    receiver: Receiver, grounds: Grounds, disks: Disks
) -> None:
    """Its state is in a place that is that user's, as docs/remote.md has it."""
    device, state = disks.loop(SIZE), grounds.top / "state"
    restricted = ("recv", "--restrict", grounds.folder, "--device", device, device, "--quiet")
    done = receiver.blktrack(*restricted, stdin=full(), BLKTRACK_ROOT=str(state))
    assert done.code == 1 and "Permission denied" in done.err
    state.mkdir()
    os.chown(state, 65534, 65534)
    done = receiver.blktrack(*restricted, stdin=full(), BLKTRACK_ROOT=str(state))
    assert done.code == 1 and "Permission denied" in done.err
    owner = device.stat()
    disks.held.callback(os.chown, device, owner.st_uid, owner.st_gid)  # a node outlives its disk
    os.chown(device, 65534, 65534)
    for delta in (full(), increment(data=[(4096, 4096)])):
        done = receiver.blktrack(*restricted, stdin=delta, BLKTRACK_ROOT=str(state))
        assert (done.code, done.err) == (0, "")
    assert device.read_bytes() == 2 * FILL + bytes(SIZE - 8192)


@pytest.mark.needs("root", "loop", "bpf")
def test_a_sync_to_a_plain_user(
    shared: Lab, receiver: Receiver, grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper, with pipes in the place of ssh."""
    os.chown(grounds.folder, 65534, 65534)
    script = shared.name("ssh")
    keeper = shlex.join([*receiver.command(), "-m", "blktrack", "recv", "--restrict"])
    script.write_text(f"#!/bin/sh\ncd / && exec {keeper} {grounds.folder}\n", encoding="ascii")
    script.chmod(0o755)
    monkeypatch.setenv("BLKTRACK_SSH", str(script))
    device = filled(shared, SIZE)
    shared.track(device)
    for mode in ("initial", "incremental"):
        target = f"ssh://far{grounds.folder}/x.img"
        done = shared.blktrack("sync", device, target, "--json")
        assert done.code == 0, done.err
        assert done.json["mode"] == mode
        assert (grounds.folder / "x.img").read_bytes() == bytes(read_image(device))
        write_direct(device, 4096, FILL)
    done = shared.blktrack("sync", device, f"ssh://far{grounds.outside}/file", "--force")
    assert (done.code, done.out) == (1, "")
    assert f"far: {grounds.outside}/file is neither in {grounds.folder} nor a dev" in done.err
    assert "--device of blktrack recv, on this host" in done.err


@pytest.mark.needs("root")
def test_help_and_versions(receiver: Receiver) -> None:
    done = receiver.blktrack("recv", "--help")
    assert (done.code, done.err) == (0, "") and "--restrict DIR" in done.out
    done = receiver.blktrack("--version")
    assert done.code == 0 and "bcc      not installed" in done.out
    for words in (("help",), ("completion", "bash")):
        assert receiver.blktrack(*words).code == 0


@pytest.mark.needs("root", "loop")
def test_what_needs_more_says_what(receiver: Receiver, disks: Disks) -> None:
    """As root, with the same Python."""
    env = {"BLKTRACK_ROOT": str(disks.folder / "root")}

    def blktrack(*words: str, before: str = "") -> Done:
        code = f"import sys\n{before}\nfrom blktrack.cli import main; sys.exit(main())"
        return receiver.run("-c", code, *words, env=env, user=())

    device = str(disks.loop(SIZE))
    done = blktrack("top", "--once")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "blktrack: this needs the Python package rich, which is not installed\n"
        "  -> apt-get install python3-rich, or install rich where this Python finds it\n"
    )
    assert blktrack("top", "--once", "--json", "--interval", "0.1").code == 0
    no_libbpf = "from blktrack.bpf import libbpf; libbpf.SONAME = 'libnothing.so'"
    done = blktrack("track", device, before=no_libbpf)
    assert done.code == 1 and "libbpf is not installed" in done.err
    assert "  -> apt-get install python3-bpfcc\n" in done.err
    for words in (("status",), ("stop",), ("start",)):
        assert blktrack(*words, before=no_libbpf).code == 0
    found = blktrack("doctor", "--json", before=no_libbpf)
    lacks = {check["name"] for check in json.loads(found.out)["checks"] if not check["ok"]}
    assert {"libbpf", "bcc"} <= lacks and "Traceback" not in found.err


@pytest.mark.needs("root", "loop", "bpf")
def test_without_bcc_nothing_is_compiled(receiver: Receiver, disks: Disks) -> None:
    root = disks.folder / "root"
    env = {"BLKTRACK_ROOT": str(root)}
    disks.held.callback(kernel.remove, Paths.below(root).pins)
    done = receiver.run("-m", "blktrack", "track", disks.loop(SIZE), env=env, user=())
    assert done.code == 1
    assert done.err == (
        "blktrack: bcc's Python module is not installed\n  -> apt-get install python3-bpfcc\n"
    )
    assert not Paths.below(root).pins.exists(), "and nothing is left in the kernel"


def test_another_module_that_is_missing_is_a_mistake_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "blktrack.cli.status", None)
    with pytest.raises(ModuleNotFoundError):
        main(["status"])
