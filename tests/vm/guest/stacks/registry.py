"""Device stacks, made of what the kernel has and taken down with the lab they were made in.

There is no udev inside: dmsetup and lvm make the nodes below /dev/mapper themselves, and names are
those of the kernel, so that one machine has no two stacks at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.blockdev import Lab, run

# The device to be tracked, and others through which it changes: the disk of a partition.
Made = list[str]
Make = Callable[[Lab, int], Made]


@dataclass(frozen=True)
class Stack:
    name: str
    make: Make  # of about as many bytes
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()  # as tests/needs.py names them
    refused: str = ""  # why `track` does not take it, a part of the message
    rw_page: bool = False  # may be written without bios on kernels that have rw_page

    def build(self, lab: Lab, size: int) -> Made:
        """Made, and taken down with the lab."""
        if self.modules:
            run("modprobe", "-a", *self.modules)
        return self.make(lab, size)


STACKS: dict[str, Stack] = {}


def stack(
    name: str, *, modules: str = "", tools: str = "", refused: str = "", rw_page: bool = False
) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        assert name not in STACKS, name
        words = tuple(modules.split()), tuple(tools.split())
        STACKS[name] = Stack(name, make, *words, refused, rw_page)
        return make

    return register
