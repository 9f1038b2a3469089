"""What another host may have written here: `recv --restrict` (promise P8).

A replica file has to lie inside one folder once every link and `..` of its name is resolved, the
folder of its state and what is in there as well; a device has to be listed. Whoever only speaks the
protocol can make no link, so what is found by looking still holds when the target is opened, unless
somebody on this host moves things meanwhile: so nobody but the users that the folder is given to
may write there. What is opened to be written is opened without following a last link.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Sequence
from pathlib import Path

from blktrack.errors import Refused
from blktrack.ship.place import STATE
from blktrack.units import format_size


class Jail:
    """What may be opened. Sizes are bytes; None: as large as there is room."""

    folder: Path  # resolved
    devices: tuple[str, ...]  # names, which may mean nothing at present
    force: bool  # whether a client may overwrite what is not its replica
    most_staging: int | None  # of a staged increment, for whoever stages it
    most_size: int | None  # of a replica file

    def __init__(
        self,
        folder: Path,
        devices: Sequence[str] = (),
        *,
        force: bool = False,
        most_staging: int | None = None,
        most_size: int | None = None,
    ) -> None:
        """Refused if the folder is not there, everybody could make links in it, or what is written
        there would open a way to log in."""
        self.folder = Path(os.path.realpath(folder))
        self.devices = tuple(devices)
        self.force = force
        self.most_staging = most_staging
        self.most_size = most_size
        if not self.folder.is_dir():
            raise Refused(
                f"replicas are restricted to {folder}, which is not a folder",
                hint=f"mkdir {folder}, and give it to the user that receives",
            )
        self._check_writers(self.folder)
        if _home().is_relative_to(self.folder):
            raise Refused(
                f"replicas are restricted to {folder}, where the home of the user that receives is:"
                " a replica in it could be that user's key or profile",
                hint="give replicas a folder of their own, such as /srv/replicas",
            )

    def admit(self, name: str) -> str:
        """The path of a target, with its links resolved. Refused; nothing is touched.

        name -- in full, or as seen from the folder.
        """
        if not name or not name.isprintable():
            raise Refused(
                f"{name!r} is no name of a replica", hint="name a file by characters that print"
            )
        path = os.path.realpath(self.folder / name)
        if self._is_listed(path):
            return path
        inside = Path(path)
        if not inside.is_relative_to(self.folder):
            raise Refused(
                f"{name} is neither in {self.folder} nor a device that may be written",
                hint="name a file in that folder; --device of blktrack recv, on this host, adds"
                " a device",
            )
        self._check_folders(name, inside)
        self._check_file(name, inside)
        self._check_state(name, inside)
        return path

    def check_force(self, *, asked: bool) -> None:
        """Refused if a client asks for what only an operator here may grant."""
        if asked and not self.force:
            raise Refused(
                "--force is not granted to other hosts here",
                hint="look at the replica on its own host; --allow-force of blktrack recv grants"
                " it",
            )

    def check_size(self, path: str, size: int) -> None:
        """Refused if an admitted replica is a file that would be larger than may be."""
        if self.most_size is not None and size > self.most_size and not self._is_listed(path):
            raise Refused(
                f"{path} may be no larger than {format_size(self.most_size)}, and its source is"
                f" {format_size(size)} ({size} bytes)",
                hint="--max-size of blktrack recv, on this host, is that limit",
            )

    def _is_listed(self, path: str) -> bool:
        """Whether it is a device that was listed, by its number: names may have changed."""
        number = _device(path)
        return number is not None and number in {_device(name) for name in self.devices}

    def _check_folders(self, name: str, path: Path) -> None:
        """All between the folder and the target: others could not put links there, and nothing in
        there is of blktrack itself, or read by other programs because of its name."""
        parts = path.relative_to(self.folder).parts
        if any(part.startswith(".") for part in parts):
            raise Refused(f"{name} is hidden", hint="choose a name that does not begin with a dot")
        if any(part.endswith(STATE) for part in parts):
            raise Refused(
                f"{name} is within the state of a replica", hint=f"choose a name without {STATE}"
            )
        for depth in range(1, len(parts)):
            self._check_writers(self.folder.joinpath(*parts[:depth]))

    def _check_writers(self, folder: Path) -> None:
        try:
            mode = folder.stat().st_mode
        except OSError:
            return  # what is not there holds nothing
        if mode & stat.S_IWOTH:
            raise Refused(
                f"everybody on this host may write in {folder}, and so lead a replica out of it",
                hint=f"chmod o-w {folder}",
            )

    def _check_file(self, name: str, path: Path) -> None:
        try:
            info = path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise Refused(f"{name}: {error.strerror}", hint="choose another replica") from error
        if stat.S_ISDIR(info.st_mode):
            raise Refused(f"{name} is a directory", hint=f"name a file in it: {name}/replica.img")
        if stat.S_ISBLK(info.st_mode):
            raise Refused(
                f"{name} is a device that is not listed here",
                hint="--device of blktrack recv, on this host, lists it",
            )
        if not stat.S_ISREG(info.st_mode):  # a link is part of a circle
            raise Refused(f"{name} is neither a file nor a device", hint="choose another replica")
        if info.st_nlink > 1:
            # The other name may be anywhere, and what it names is written as well.
            raise Refused(
                f"{name} is a file of {info.st_nlink} names (hard links)",
                hint="give the replica a file of its own: cp it, and move that over it",
            )

    def _check_state(self, name: str, path: Path) -> None:
        """The state lies inside, and so does whatever is opened in there."""
        state = Path(f"{path}{STATE}")
        if not os.path.lexists(state):
            return
        real = Path(os.path.realpath(state))
        if not real.is_relative_to(self.folder) or not real.is_dir():
            raise Refused(
                f"the state of {name}, {state}, is not a folder in {self.folder}",
                hint="replace it by a folder, or choose another replica",
            )
        self._check_writers(real)
        try:
            with os.scandir(real) as entries:
                links = [entry.name for entry in entries if entry.is_symlink()]
        except OSError as error:
            raise Refused(
                f"the state of {name}, {state}, cannot be read: {error.strerror}",
                hint="give it to the user that receives",
            ) from error
        if links:
            raise Refused(
                f"the state of {name} has a link in it: {state / links[0]}",
                hint="remove that link; blktrack makes none",
            )


def _home() -> Path:
    """Of whoever this process is; of who has none, a place that is in no folder."""
    try:
        return Path(os.path.realpath(pwd.getpwuid(os.geteuid()).pw_dir))
    except KeyError:
        return Path()


def _device(name: str) -> int | None:
    """The number of a block device, None of anything else."""
    try:
        info = os.stat(name)
    except (OSError, ValueError):
        return None
    return info.st_rdev if stat.S_ISBLK(info.st_mode) else None
