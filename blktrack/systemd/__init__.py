"""The service unit: tracking begins before mounts and ends after them, at every boot.

systemd orders a mount after `blockdev@NAME.target` of the name that its unit, or fstab, gives the
device (systemd.special(7)). A drop-in therefore puts the service before that target for every name
that a tracked device, or a partition of a tracked disk, is known by.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from blktrack import durable
from blktrack.errors import BlktrackError
from blktrack.sysfs import BlockDevice

UNIT = "blktrack.service"
WHERE = Path("/etc/systemd/system")
VENDOR = Path("/usr/lib/systemd/system")
_DEV = Path("/dev")


def unit() -> str:
    """The unit's text, with the path of this installation's command."""
    text = Path(__file__).with_name(UNIT).read_text(encoding="utf-8")
    return text.replace("@BLKTRACK@", str(command()))


def command() -> Path:
    """The command of this installation."""
    found = Path(sys.argv[0]).resolve()
    return found if found.name == "blktrack" else Path(sys.executable).with_name("blktrack")


def ordering(devices: Iterable[BlockDevice]) -> str:
    """The drop-in for these devices: wait for each, be done before anything uses it."""
    lines = ["[Unit]"]
    for device in devices:
        own = escaped(".device", [f"/dev/{device.name}"])
        parts = {part.name for part in (device, *device.partitions)}
        targets = escaped("", names(parts))
        lines.append(f"# {device.path}")
        lines += [f"{word}={name}" for name in own for word in ("Wants", "After")]
        lines += [f"{word}={name}" for name in targets for word in ("Wants", "Before")]
    return "\n".join(lines) + "\n"


def names(kernel_names: set[str]) -> list[str]:
    """Every path below /dev that leads to one of these devices."""
    found = {f"/dev/{name.replace('!', '/')}" for name in kernel_names}
    for folder, _, files in os.walk(_DEV):
        for file in files:
            path = Path(folder, file)
            if path.is_symlink() and Path(os.path.realpath(path)).name in kernel_names:
                found.add(str(path))
    return sorted(found)


def escaped(suffix: str, paths: list[str]) -> list[str]:
    """As unit names: of the devices with a suffix, without one of their blockdev targets."""
    kind = ["--suffix", suffix.lstrip(".")] if suffix else ["--template", "blockdev@.target"]
    return _run("systemd-escape", "--path", *kind, *paths).split()


def install(devices: Iterable[BlockDevice], where: Path = WHERE) -> list[Path]:
    """Write unit and drop-in, and have them used from the next boot on. The files written.

    Where a package has brought the same unit only the drop-in is written. A unit that hides the
    package's goes if it is of another installation, and stays if it is the administrator's.
    """
    own = where / UNIT
    texts = {own: unit(), where / f"{UNIT}.d" / "devices.conf": ordering(devices)}
    if where == WHERE and is_packaged():
        if own.exists() and os.fsencode(f"={command()} ") not in own.read_bytes():
            own.unlink()
        del texts[own]
    for path, text in texts.items():
        durable.write_bytes(path, os.fsencode(text))
        path.chmod(0o644)
    if where == WHERE:
        _run("systemctl", "enable", "--quiet", UNIT)
        _reload()
    return list(texts)


def is_installed() -> bool:
    """Written by `install`, or brought by a package and enabled; what the administrator disabled
    stays as it is, and on a host without systemd no unit is in use."""
    return (WHERE / UNIT).exists() or (is_packaged() and _is_enabled())


def is_packaged() -> bool:
    """A package, this installation's, has brought the unit."""
    try:
        return (VENDOR / UNIT).read_bytes() == os.fsencode(unit())
    except OSError:
        return False


def remove(where: Path = WHERE) -> None:
    """Take unit and drop-in away; of a packaged unit the drop-in, and it is disabled."""
    if where == WHERE and ((where / UNIT).exists() or is_packaged()):
        _run("systemctl", "disable", "--quiet", UNIT)
    (where / UNIT).unlink(missing_ok=True)
    shutil.rmtree(where / f"{UNIT}.d", ignore_errors=True)
    if where == WHERE:
        _reload()


def _is_enabled() -> bool:
    try:
        _run("systemctl", "is-enabled", "--quiet", UNIT)
    except BlktrackError:
        return False
    return True


def is_booted() -> bool:
    """Whether systemd manages this host; in a chroot or an image none runs."""
    return Path("/run/systemd/system").is_dir()  # sd_booted(3)


def control(*words: str) -> None:
    """Tell the manager. BlktrackError."""
    _run("systemctl", *words)


def _reload() -> None:
    """A manager that runs reads the files again."""
    if is_booted():
        control("daemon-reload")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BlktrackError(
            f"{command[0]} is missing: this host does not use systemd",
            hint="run blktrack start before file systems are mounted, stop after",
        ) from error
    if done.returncode:
        said = done.stderr.strip() or f"it ended with code {done.returncode}"
        raise BlktrackError(
            f"{' '.join(command[:3])} failed: {said}", hint="run it by hand to see what it needs"
        )
    return done.stdout
