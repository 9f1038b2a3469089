"""A line in /etc/cron.d, which every cron of Linux reads by itself."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from blktrack.errors import BlktrackError, UsageError
from blktrack.schedule import files
from blktrack.schedule.files import File, Instance

WHERE = Path("/etc/cron.d")
_MAILTO = re.compile(r"^#?MAILTO=.*$", re.MULTILINE)


def times(every: float) -> str:
    """The five fields. UsageError for what they cannot say evenly."""
    minutes, rest = divmod(every, 60)
    hours, odd = divmod(minutes, 60)
    if not rest and 1 <= minutes <= 30 and 60 % minutes == 0:
        return "* * * * *" if minutes == 1 else f"*/{minutes:.0f} * * * *"
    if not rest and not odd and 1 <= hours <= 24 and 24 % hours == 0:
        field = {1: "*", 24: "0"}.get(int(hours), f"*/{hours:.0f}")
        return f"0 {field} * * *"
    raise UsageError(
        f"cron cannot run something every {every:g} seconds evenly",
        hint="use 1m, 2m, 3m, 4m, 5m, 6m, 10m, 12m, 15m, 20m, 30m, 1h, 2h, 3h, 4h, 6h, 8h, 12h or "
        "1d; blktrack install systemd takes any other",
    )


def path(instance: Instance) -> Path:
    """Without a dot in its name, for which cron would leave it out."""
    return WHERE / instance.name


def listed(instance: Instance, every: float) -> list[File]:
    """The file, with what an earlier one says of whom to mail to."""
    words = [] if instance.root is None else [f"BLKTRACK_ROOT={shlex.quote(str(instance.root))}"]
    words.append(shlex.quote(str(instance.command)))
    command = " ".join(words).replace("%", r"\%")  # which is a line's end to cron
    text = files.rendered("blktrack.cron", {"WHEN": times(every), "COMMAND": command})
    if kept := _MAILTO.search(_text(path(instance))):
        text = _MAILTO.sub(lambda _: kept[0], text)
    return [File(path(instance), text)]


def is_installed(instance: Instance) -> bool:
    return path(instance).exists()


def install(instance: Instance, every: float) -> list[Path]:
    """The files that had to be written."""
    found = listed(instance, every)
    if not WHERE.is_dir():
        raise BlktrackError(
            f"this host has no {WHERE}: cron is not installed",
            hint="install it, or use blktrack install systemd",
        )
    return [file.path for file in found if file.write()]


def remove(instance: Instance) -> list[Path]:
    """The files that were there."""
    return [path(instance)] if files.remove(path(instance)) else []


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
