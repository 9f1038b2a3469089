"""A policy of loop devices with replicas, and what tells whether they are in step."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from blktrack.units import KIB, MIB
from tests import sectors
from tests.background import Running
from tests.blockdev import Done, Lab, read_image, write_direct
from tests.oracle import fill

SIZE = 4 * MIB


@dataclass
class Disk:
    """A device of the policy; values are as the file has them: '"1M"'."""

    path: str
    keys: dict[str, str]
    replicas: dict[str, Path] = field(default_factory=dict)
    of_replica: dict[str, dict[str, str]] = field(default_factory=dict)


class Fleet:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.policy = lab.store.paths.policy
        self.disks: dict[str, Disk] = {}
        self.defaults: dict[str, str] = {}
        # The instance is shared: what was told and promised in it ends with the test.
        for path in (self.policy, lab.store.paths.lib / "told.json"):
            lab.stack.callback(path.unlink, missing_ok=True)

    def add(
        self, name: str, replicas: tuple[str, ...] = ("near",), *, path: str = "", **keys: str
    ) -> Disk:
        """A device full of data, unless it is the one at `path`."""
        device = path or self.lab.loop(SIZE)
        if not path:
            fill(device)
        disk = Disk(device, keys, {each: self.lab.name(f"{name}-{each}-") for each in replicas})
        self.disks[name] = disk
        return disk

    def write(self, text: str = "") -> None:
        """The policy file, by the disks or as it is given."""
        lines = ["[defaults]", *_values(self.defaults)]
        for name, disk in self.disks.items():
            lines += [f"[device.{name}]", f'path = "{disk.path}"', *_values(disk.keys)]
            for each, target in disk.replicas.items():
                lines += [f"[device.{name}.replica.{each}]", f'target = "{target}"']
                lines += _values(disk.of_replica.get(each, {}))
        self.policy.parent.mkdir(parents=True, exist_ok=True)
        self.policy.write_text(text or "\n".join(lines) + "\n")

    def sync(self, *words: str) -> Done:
        return self.lab.blktrack("sync", "--all", *words)

    def start(self, *words: str) -> Running:
        return Running(self.lab, "sync", "--all", *words)

    def change(self, number: int) -> None:
        """64 KiB of each device that is there; differs with `number`."""
        for at, disk in enumerate(self.disks.values()):
            if Path(disk.path).exists():
                offset = (at + number) * 64 * KIB % SIZE
                write_direct(disk.path, offset, sectors.make(offset, 64 * KIB, number))

    def in_step(self, name: str, replica: str = "near") -> bool:
        disk = self.disks[name]
        target = disk.replicas[replica]
        return target.exists() and not sectors.faults(read_image(disk.path), read_image(target))


def _values(keys: dict[str, str]) -> list[str]:
    return [f"{key.replace('_', '-')} = {value}" for key, value in keys.items()]


def children(pid: int) -> list[int]:
    """Processes that were forked by a process and are not gone; that it is gone itself is none."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.scandir(f"/proc/{pid}/task"):
            text = Path(task.path, "children").read_text(encoding="ascii")
            found += [int(word) for word in text.split()]
    return found


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"
