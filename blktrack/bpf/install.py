"""Putting the programs and maps in place: made, attached and pinned, or the reason why not."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections.abc import Mapping
from pathlib import Path

from blktrack import sysfs
from blktrack.bpf import abi, libbpf
from blktrack.bpf.compile import fingerprint
from blktrack.bpf.kernel import Detached, Kernel, create_inner, remove
from blktrack.bpf.load import attached, load
from blktrack.bpf.planes import Geometry
from blktrack.bpf.programs import BY_KIND
from blktrack.errors import BlktrackError


def install(root: Path, *kinds: int) -> Kernel:
    """Attach the programs for these kinds of device, making maps and pins as needed."""
    mount_bpffs(root.parent)
    pins = root / fingerprint()
    new = not all((pins / name).exists() for name in abi.MAPS)
    if new:
        _create_maps(root, pins)
    kernel = Kernel(root)
    names = tuple(name for kind in kinds for name in BY_KIND[kind])
    if not all((pins / f"link_{name}").exists() for name in names):
        try:
            _attach(pins, names, kernel.maps)
        except BaseException:
            kernel.close()
            if new:  # of no use to anybody, and nobody would look for them
                remove(root)
            raise
    return kernel


def hand_over(pins: Path, root: Path) -> None:
    """Let an instance that is at rest and has no devices be the one below `root`, if none is."""
    if not root.exists():
        with contextlib.suppress(OSError):  # it would only save the time to load them again
            pins.rename(root)


def drop_unused(root: Path) -> None:
    """Unpin all if no device has a slot."""
    with contextlib.suppress(Detached), Kernel(root) as kernel:
        kernel.drop_unused()


def _attach(pins: Path, names: tuple[str, ...], maps: Mapping[str, int]) -> None:
    """Attach completions first: what is seen to begin is then seen to end.

    Programs run in the order in which they are attached (kernel/tracepoint.c, func_add), so that
    copies come last. They are pinned first: with what they are copies of, all are there.
    """
    links: dict[str, int] = {}
    try:
        links = attached(names[::-1], maps)
        for name, link in reversed(links.items()):
            path = pins / f"link_{name}"
            path.unlink(missing_ok=True)
            libbpf.pin(link, path)
    except OSError as error:
        raise BlktrackError(
            f"the kernel refused to attach the tracking programs: {error}",
            hint="run blktrack doctor",
        ) from error
    finally:
        for fd in links.values():
            os.close(fd)


def probe() -> None:
    """Make maps, compile and load what would be attached, and let it all go. BlktrackError if any
    of it fails."""
    maps = make_maps()
    try:
        for fd in load(itertools.chain(*BY_KIND.values()), maps).values():
            os.close(fd)
    finally:
        for fd in maps.values():
            os.close(fd)


def make_maps() -> dict[str, int]:
    """The shared maps: descriptors by name."""
    # Kernels before 5.11 charged maps to this limit; raising it is harmless later.
    with contextlib.suppress(OSError, ValueError):
        endless = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (endless, endless))
    fds: dict[str, int] = {}
    template = -1
    try:
        template = create_inner(Geometry(1))
        fds["windows"] = libbpf.create_map(
            libbpf.MAP_ARRAY,
            "blktrack_windows",
            4,
            abi.WINDOWS.itemsize,
            1,
            flags=libbpf.F_MMAPABLE,
        )
        fds["planes"] = libbpf.create_map(
            libbpf.MAP_ARRAY_OF_MAPS, "blktrack_planes", 4, 4, abi.SLOTS, inner=template
        )
        fds["stats"] = libbpf.create_map(
            libbpf.MAP_PERCPU_ARRAY, "blktrack_stats", 4, abi.STATS.itemsize, abi.SLOTS
        )
        fds["inflight"] = libbpf.create_map(
            libbpf.MAP_HASH, "blktrack_bios", 8, abi.BIO.itemsize, abi.INFLIGHT
        )
        fds["seen"] = libbpf.create_map(libbpf.MAP_HASH, "blktrack_seen", 8, 4, abi.SEEN)
        fds["caught"] = libbpf.create_map(libbpf.MAP_ARRAY, "blktrack_caught", 4, 8, len(BY_KIND))
    except OSError as error:
        for fd in fds.values():
            os.close(fd)
        raise BlktrackError(
            f"cannot make the tracking maps: {error}", hint="run blktrack doctor"
        ) from error
    finally:
        if template >= 0:
            os.close(template)
    return fds


def _create_maps(root: Path, pins: Path) -> None:
    """In place of all that is pinned there."""
    fds = make_maps()
    try:
        remove(root)
        pins.mkdir(mode=0o700, parents=True)
        for name in abi.MAPS:
            libbpf.pin(fds[name], pins / name)
    except OSError as error:
        raise BlktrackError(
            f"cannot pin the tracking maps in {pins}: {error}", hint="run blktrack doctor"
        ) from error
    finally:
        for fd in fds.values():
            os.close(fd)


def mount_bpffs(where: Path) -> None:
    """Mount bpffs where pins go, if it is not."""
    if sysfs.filesystem_at(where) == "bpf":
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
        libbpf.mount("bpf", where)
    except OSError as error:
        raise BlktrackError(
            f"cannot mount bpffs on {where}: {error.strerror}",
            hint=f"run as root: mount -t bpf bpf {where}",
        ) from error
