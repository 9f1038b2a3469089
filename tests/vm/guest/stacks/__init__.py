"""Device stacks: importing a module of this folder registers those that it makes."""

from tests.vm.guest.stacks import bcache, disks, lvm, mapper, md, refused
from tests.vm.guest.stacks.registry import STACKS, Stack

__all__ = ["STACKS", "Stack", "bcache", "disks", "lvm", "mapper", "md", "refused"]
