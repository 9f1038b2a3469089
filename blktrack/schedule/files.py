"""The files of a schedule: made from templates, written where they differ, taken back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blktrack import durable
from blktrack.errors import BlktrackError, Refused

EVERY = 300.0  # seconds from one run to the next
_OURS = "blktrack install "  # in the first lines of every file


@dataclass(frozen=True)
class Instance:
    """Whose schedule it is. Instances have files of their own, so that they do not meet."""

    name: str  # "blktrack" is the host's own
    command: Path  # of this installation
    root: Path | None = None  # its BLKTRACK_ROOT


@dataclass(frozen=True)
class File:
    path: Path
    text: str

    def write(self) -> bool:
        """Whether it had to be. Refused where something else lies there."""
        before = _read(self.path)
        if before is not None and not _is_ours(before):
            raise Refused(
                f"{self.path} was not written by blktrack", hint="move it away, then install"
            )
        if before == self.text:
            return False
        mask = os.umask(0o022)  # cron reads nothing that others can write
        try:
            durable.write_bytes(self.path, os.fsencode(self.text))
            self.path.chmod(0o644)
        finally:
            os.umask(mask)
        return True


def rendered(template: str, values: Mapping[str, str]) -> str:
    """The text of a template, its @WORDS@ replaced."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    for word, value in values.items():
        text = text.replace(f"@{word}@", value)
    return text


def remove(path: Path) -> bool:
    """Take a file back; whether it was there. Refused if it is not ours."""
    before = _read(path)
    if before is None:
        return False
    if not _is_ours(before):
        raise Refused(f"{path} was not written by blktrack", hint="remove it by hand")
    try:
        path.unlink()
        durable.sync_directory(path.parent)
    except OSError as error:
        raise BlktrackError(
            f"cannot remove {path}: {error.strerror}", hint="make its file system writable"
        ) from error
    return True


def _read(path: Path) -> str | None:
    try:
        return os.fsdecode(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BlktrackError(
            f"cannot read {path}: {error.strerror}", hint="see what it is"
        ) from error


def _is_ours(text: str) -> bool:
    return any(_OURS in line for line in text.splitlines()[:2])
