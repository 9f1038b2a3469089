"""The packages: built, then installed where nothing else of blktrack is."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from blktrack.units import MIB
from tests import sectors
from tests.blockdev import TOP, Lab, run, write_direct
from tests.cleanroot import CleanRoot, clean_root
from tests.jails import FILL, full
from tests.oracle import fill

RECOMMENDED = ("python3-bpfcc", "python3-pyroute2", "python3-rich")
_WRITES = itertools.count(1)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("deb"))


def build(folder: Path, umask: str = "022") -> Path:
    run("sh", "-c", f"umask {umask} && exec tools/deb.sh '{folder}'")
    (found,) = folder.glob("blktrack_*_all.deb")
    return found


def change(device: str, size: int) -> None:
    """So many bytes at the start."""
    write_direct(device, 0, sectors.make(0, size, next(_WRITES)))


@pytest.mark.needs("debhelper", "lintian")
def test_the_package_has_the_form_that_debian_asks_for(package: Path, tmp_path: Path) -> None:
    asked = ("--allow-root", "--fail-on=error,warning", "--no-tag-display-limit")
    done = subprocess.run(
        ["lintian", *asked, str(package)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # it leaves files there
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.needs("debhelper")
def test_the_same_sources_make_the_same_package(package: Path, tmp_path: Path) -> None:
    again = build(tmp_path, umask="077")
    assert again.read_bytes() == package.read_bytes()


@pytest.mark.needs("root", "loop", "bpf", "debhelper", "debootstrap")
@pytest.mark.timeout(900)
def test_installed_in_a_clean_root(lab: Lab, package: Path) -> None:
    device = lab.loop(32 * MIB)
    fill(device)
    folder = lab.stack.enter_context(clean_root(lab.name("clean")))
    # Not ours, but what the test looks with.
    folder.install("man-db", "systemd")
    before = folder.files()
    run("cp", package, folder.folder / "tmp")
    folder.install(f"/tmp/{package.name}")
    check_that_it_receives(folder)
    folder.install(*RECOMMENDED)
    version = package.name.split("_")[1]
    assert folder.run("blktrack", "--version").out.startswith(f"blktrack {version}")
    folder.run("blktrack", "doctor")
    check_what_came_along(folder)
    check_replication(folder, device)
    check_the_unit(folder, device)
    check_upgrade(folder, package, device)
    check_removal(folder, package, device, before)


def check_that_it_receives(root: CleanRoot) -> None:
    """Without what is recommended, as a plain user, through the command of a key."""
    root.run("blktrack", "recv", "--help")
    (root.folder / "tmp/full.delta").write_bytes(full())
    root.run("install", "-d", "-o", "nobody", "/srv/replicas")
    restricted = (
        "exec setpriv --reuid=nobody --regid=nogroup --clear-groups"
        " blktrack recv --restrict /srv/replicas --json </tmp/full.delta"
    )
    asked = ("env", "SSH_ORIGINAL_COMMAND=blktrack recv /srv/replicas/x.img", "sh", "-c")
    assert json.loads(root.run(*asked, restricted).out)["mode"] == "initial"
    assert (root.folder / "srv/replicas/x.img").read_bytes()[: len(FILL)] == FILL
    for command, package in (
        (("top", "--once"), "python3-rich"),
        (("track", "/dev/loop0"), "python3-bpfcc"),
    ):
        told = root.run("blktrack", *command, code=1).err
        assert f"apt-get install {package}" in told and len(told.splitlines()) == 2
    root.run("rm", "-r", "/srv/replicas")


def check_what_came_along(root: CleanRoot) -> None:
    assert root.run("man", "-w", "blktrack-sync").out.endswith("/blktrack-sync.8.gz\n")
    completion = "/usr/share/bash-completion/completions/blktrack"
    listed = root.run("bash", "-c", f". {completion} && complete -p blktrack").out
    assert "blktrack" in listed
    assert root.run("test", "-s", "/usr/share/zsh/vendor-completions/_blktrack").code == 0
    root.run("systemd-analyze", "verify", "blktrack.service")
    assert root.run("systemctl", "is-enabled", "blktrack.service").out == "enabled\n"


def check_replication(root: CleanRoot, device: str) -> None:
    root.run("blktrack", "track", device)
    assert synced(root, device)["mode"] == "initial"
    change(device, 4 * MIB)
    done = synced(root, device)
    assert (done["mode"], done["bytes_changed"]) == ("incremental", 4 * MIB)
    root.run("blktrack", "verify", device, "/replica.img")


def synced(root: CleanRoot, device: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        root.run("blktrack", "sync", device, "/replica.img", "--json").out
    )
    return found


def check_the_unit(root: CleanRoot, device: str) -> None:
    """The drop-in knows the device; what another installation left does not hide the package's,
    what an administrator made of that does."""
    own = root.folder / "etc/systemd/system/blktrack.service"
    drop_in = root.folder / "etc/systemd/system/blktrack.service.d/devices.conf"
    name = Path(device).name
    assert f"Before=blockdev@dev-{name}.target" in drop_in.read_text(encoding="utf-8")
    assert not own.exists()
    # Nothing says that an administrator writes UTF-8.
    remark = "# d'été\n".encode("latin-1")
    own.write_bytes(remark + b"[Service]\nExecStart=/opt/blktrack start\n")
    root.run("blktrack", "service", "install")
    assert not own.exists()
    own.write_bytes(remark + root.run("blktrack", "service", "show").out.encode())
    root.run("blktrack", "service", "install")
    assert own.exists()
    own.unlink()


def check_upgrade(root: CleanRoot, package: Path, device: str) -> None:
    """The programs mark on while files are replaced: the next sync is an incremental one."""
    pins = root.run("sh", "-c", "stat -c %i /sys/fs/bpf/blktrack/*/*").out
    change(device, 2 * MIB)
    root.run("dpkg", "-i", f"/tmp/{package.name}")
    assert root.run("sh", "-c", "stat -c %i /sys/fs/bpf/blktrack/*/*").out == pins
    assert synced(root, device)["mode"] == "incremental"


def check_removal(root: CleanRoot, package: Path, device: str, before: set[str]) -> None:
    change(device, 2 * MIB)
    done = root.run("dpkg", "-r", "blktrack")
    assert f"{device}: stopped" in done.out
    root.run("test", "!", "-e", "/sys/fs/bpf/blktrack")
    root.run("dpkg", "-i", f"/tmp/{package.name}")
    assert f"{device}: resumed" in root.run("blktrack", "start").out
    assert synced(root, device)["mode"] == "incremental"
    schedule = root.folder / "etc/cron.d/blktrack"
    schedule.parent.mkdir(exist_ok=True)
    policy = f'[device.a]\npath = "{device}"\n[device.a.replica.r]\ntarget = "/replica.img"\n'
    (root.folder / "etc/blktrack").mkdir()
    (root.folder / "etc/blktrack/blktrack.toml").write_text(policy, encoding="utf-8")
    root.run("blktrack", "install", "cron")
    assert root.run("blktrack", "sync", "--all", "--quiet").out == ""
    assert "/usr/bin/blktrack sync --all" in schedule.read_text(encoding="utf-8")
    root.run("dpkg", "-r", "blktrack")
    assert not schedule.exists(), "it would only fail, every few minutes"
    root.run("test", "!", "-e", "/sys/fs/bpf/blktrack")
    (root.folder / "var/lib/blktrack/replicas/some").mkdir(parents=True)
    told = root.run("dpkg", "--purge", "blktrack")
    assert "/var/lib/blktrack/replicas is kept" in told.err
    assert (root.folder / "var/lib/blktrack/replicas/some").exists()
    run("rm", "-r", root.folder / "var/lib/blktrack", root.folder / "replica.img.blktrack")
    (root.folder / "replica.img").unlink()
    depended = root.run("dpkg-query", "-f", "${Package} ", "-W").out
    assert "blktrack" not in depended.split()
    assert not [path for path in root.files() - before if "blktrack" in path]


@pytest.mark.needs("root", "loop", "bpf")
def test_the_wheel_works_on_its_own(lab: Lab) -> None:
    """In an environment that has what it depends on, and not the sources."""
    built, venv = lab.name("dist"), lab.name("venv")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", built)
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", venv)
    python = venv / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", wheel)
    (site,) = venv.glob("lib/python3*/site-packages")
    # A folder named in a .pth file has its own .pth files ignored, that of the sources with them.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    where = run(python, "-P", "-c", "import blktrack; print(blktrack.__file__)")
    assert Path(where.strip()).is_relative_to(venv)
    device, replica = lab.loop(32 * MIB), lab.name("replica")
    fill(device)

    def blktrack(*words: str | Path) -> str:
        done = subprocess.run(
            [venv / "bin/blktrack", *words], cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    blktrack("track", device)
    assert json.loads(blktrack("sync", device, replica, "--json"))["mode"] == "initial"
    change(device, 4 * MIB)
    assert json.loads(blktrack("sync", device, replica, "--json"))["mode"] == "incremental"
    blktrack("verify", device, replica)
    assert str(TOP) not in blktrack("service", "show")
