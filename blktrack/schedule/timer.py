"""A timer of systemd and the service that it runs.

The link that enables the timer is made here, as `systemctl enable` would: it can be had in a chroot
or an image too, where no manager runs.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from blktrack import durable, systemd
from blktrack.errors import BlktrackError, UsageError
from blktrack.schedule import files
from blktrack.schedule.files import File, Instance

WHERE = systemd.WHERE
_LEAST = 10.0  # seconds between runs
_FIRST = 120.0  # seconds after boot, at most


def listed(instance: Instance, every: float) -> list[File]:
    """Service and timer. UsageError for runs that would follow each other too fast."""
    if every < _LEAST:
        raise UsageError(
            f"a run every {every:g} seconds would only be in its own way",
            hint=f"use {_LEAST:g}s or more",
        )
    values = {
        "NAME": _name(instance),
        "COMMAND": _escaped(str(instance.command)),
        "EVERY": f"{every:g}s",
        "FIRST": f"{min(every, _FIRST):g}s",
        "ACCURACY": f"{max(1.0, min(every / 30, 30.0)):.0f}s",
    }
    service = files.rendered("blktrack-sync.service", values)
    if instance.root is not None:
        root = _escaped(f"BLKTRACK_ROOT={instance.root}", dollar="$")
        service = service.replace("Type=oneshot\n", f"Type=oneshot\nEnvironment={root}\n")
    return [
        File(_service(instance), service),
        File(_timer(instance), files.rendered("blktrack-sync.timer", values)),
    ]


def is_installed(instance: Instance) -> bool:
    return _timer(instance).exists() or _enabled(instance).is_symlink()


def install(instance: Instance, every: float) -> list[Path]:
    """The files that had to be written. Where systemd runs, the timer does from now on."""
    written = [file.path for file in listed(instance, every) if file.write()]
    link = _enabled(instance)
    if not link.is_symlink() or os.readlink(link) != str(_timer(instance)):
        durable.make_directory(link.parent)
        link.unlink(missing_ok=True)
        link.symlink_to(_timer(instance))
        durable.sync_directory(link.parent)
        written.append(link)
    if systemd.is_booted():
        systemd.control("daemon-reload")
        systemd.control("restart" if written else "start", _timer(instance).name)
    return written


def remove(instance: Instance) -> list[Path]:
    """The files that were there. A sync that is under way goes on to its end."""
    if systemd.is_booted():
        with contextlib.suppress(BlktrackError):  # it may be half gone
            systemd.control("stop", _timer(instance).name)
    link = _enabled(instance)
    removed = []
    if link.is_symlink():
        link.unlink()
        durable.sync_directory(link.parent)
        removed.append(link)
    removed += [path for path in (_timer(instance), _service(instance)) if files.remove(path)]
    if removed and systemd.is_booted():
        systemd.control("daemon-reload")
    return removed


def _name(instance: Instance) -> str:
    return f"{instance.name}-sync"


def _service(instance: Instance) -> Path:
    return WHERE / f"{_name(instance)}.service"


def _timer(instance: Instance) -> Path:
    return WHERE / f"{_name(instance)}.timer"


def _enabled(instance: Instance) -> Path:
    return WHERE / "timers.target.wants" / _timer(instance).name


def _escaped(word: str, *, dollar: str = "$$") -> str:
    """One word of a unit file: systemd.syntax(7), systemd.service(5)."""
    text = word.replace("%", "%%").replace("$", dollar)
    if not any(c.isspace() or c in "\"'\\;" for c in text):
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'
