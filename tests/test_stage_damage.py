"""Damaged stages, and stages that cannot be sealed: the replica stays at a point, or says so."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blktrack.errors import BlktrackError, CopyFailed
from blktrack.extent import from_pairs
from blktrack.ship.apply import finish
from blktrack.ship.copy import Copied, copy
from blktrack.ship.endpoint import open_end
from blktrack.ship.header import Header, StageDamaged
from blktrack.ship.place import inspect
from blktrack.ship.record import State
from blktrack.ship.stage import is_left
from blktrack.units import MIB
from tests.increments import SIZE, Lab, poke
from tests.loopdev import Disks
from tests.stager import bring, point

pytestmark = pytest.mark.needs("root", "loop")


SMALL = MIB


def edit(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "incoming.json"
        *above, last = name.split(".")
        everything = inner = json.loads(path.read_text())
        for key in above:
            inner = inner[key]
        inner[last] = value
        path.write_text(json.dumps(everything))

    return change


def put(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def index_of(*rows: tuple[int, int, int]) -> Callable[[Path], None]:
    """An index that nobody would seal, with its digest."""

    def change(folder: Path) -> None:
        data = np.array(rows, dtype="<i8").tobytes()
        (folder / "incoming.index").write_bytes(data)
        edit("extents", len(rows))(folder)
        sealed = Header.read(folder)
        assert sealed is not None
        edit("digest", sealed.over(data))(folder)

    return change


def truncate(folder: Path) -> None:
    os.truncate(folder / "incoming.pack", SMALL - 512)


def overwrite(folder: Path) -> None:
    poke(folder / "incoming.pack", 0)


def replace_by_a_link(folder: Path) -> None:
    (folder / "incoming.pack").rename(folder / "elsewhere")
    (folder / "incoming.pack").symlink_to("elsewhere")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


# Found by whoever reads the header, which is all that a look does.
HEADERS = {
    "an empty header": put("incoming.json", b""),
    "a header that is no object": put("incoming.json", b"[]"),
    "a deep header": put("incoming.json", b"[" * 60_000),
    "a long header": put("incoming.json", b" " * (1 << 20)),
    "a header of nothing": put("incoming.json", b"{}"),
    "a text for a size": edit("size", "x"),
    "a negative size": edit("size", -1),
    "a size beyond any": edit("size", 1 << 80),
    "true for a count": edit("extents", True),
    "a list for a link": edit("link", []),
    "no points": edit("point", None),
    "a list for a point": edit("base", [1]),
    "a point of no time": edit("point.time", float("nan")),
    "a point of another level": edit("point.consistency", "best"),
    "a level that is none": edit("point.consistency", ["none"]),
    "a generation that is none": edit("base.generation", 7),
}
DAMAGES = HEADERS | {
    "no image": without("incoming.pack"),
    "a short image": truncate,
    "an image written to": overwrite,
    "an image elsewhere": replace_by_a_link,
    "no extents": without("incoming.index"),
    "other extents": flip("incoming.index"),
    "extents cut off": put("incoming.index", b"12345678"),
    "a huge size": edit("size", 1 << 62),
    "a huge length": edit("packed", 1 << 62),
    "a huge count": edit("extents", 1 << 59),
    "extents beyond the end": index_of((0, 512, -1), (SMALL - 512, 1024, -1)),
    "extents that overlap": index_of((0, 1024, -1), (512, 512, -1)),
    "extents in disorder": index_of((1024, 512, -1), (0, 512, -1)),
    "extents of nothing": index_of((0, 0, -1)),
    "extents before the beginning": index_of((-512, 1024, -1)),
    "extents whose sum overflows": index_of((512, (1 << 63) - 1, -1)),
    "data beyond the end of the pack": index_of((0, 4096, 1 << 40)),
    "data before its beginning": index_of((0, 4096, -4096)),
    "data whose sum overflows": index_of((0, 4096, (1 << 63) - 4096)),
    "data that lies askew": index_of((0, 512, 512)),
}


@pytest.fixture
def kept(disks: Disks, seed: int) -> tuple[Lab, bytes]:
    """A replica for which a stage is sealed."""
    lab = Lab(disks, "tmpfs", seed, SMALL)
    new = lab.change()
    lab.seal()
    return lab, new


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(kept: tuple[Lab, bytes], damage: str) -> None:
    """Before it is begun, a damaged stage is dropped; afterwards it is told, and left."""
    lab, _ = kept
    name, paths = str(lab.target), lab.order.paths
    saved = lab.disks.name("saved")
    shutil.copytree(lab.folder, saved)
    DAMAGES[damage](lab.folder)
    assert lab.record().point == point(0)
    assert lab.has_settled() == 0
    assert lab.holds(lab.old)

    shutil.copytree(saved, lab.folder, dirs_exist_ok=True)
    DAMAGES[damage](lab.folder)
    record = finish(name, paths)
    assert record is not None and record.point == point(0)
    assert not is_left(lab.folder)

    shutil.copytree(saved, lab.folder, dirs_exist_ok=True)
    record = dataclasses.replace(record, state=State.APPLYING, next=point(1))
    record.write(lab.folder / "replica.json")
    DAMAGES[damage](lab.folder)
    _, change = inspect(name, paths)
    assert ("left between two points" in change) == (damage in HEADERS)
    with pytest.raises(BlktrackError, match="is at no point: it was left between") as caught:
        finish(name, paths)
    assert "blktrack sync" in caught.value.hint
    with lab.open() as replica:
        assert "left between two points" in replica.changed
        assert replica.finished is None
        assert is_left(lab.folder)
        replica.begin(State.UNFINISHED, "generation-1")
        assert not is_left(lab.folder)
        replica.commit(point(5))
    assert lab.has_settled() == 5


def test_an_overlay_that_cannot_be_read(
    kept: tuple[Lab, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found when the replica has left its point: by the next run, and again in the run's own."""
    lab, _ = kept
    bad = from_pairs([(0, 4096)])

    def fail(*arguments: Any, **options: Any) -> Copied:
        return dataclasses.replace(copy(*arguments, **options), failed=bad)

    monkeypatch.setattr("blktrack.ship.apply.copy", fail)
    with pytest.raises(BlktrackError, match=r"is at no point: .*cannot be read"):
        finish(str(lab.target), lab.order.paths)
    with lab.open() as replica:
        assert "left between two points" in replica.changed and "4 KiB" in replica.changed
        replica.begin(State.UNFINISHED, "generation-1")
        replica.commit(point(1))
        lab.change()
        with pytest.raises(StageDamaged, match="cannot be read"), lab.staged(replica) as stage:
            replica.apply(stage)
        assert "cannot be read" in replica.changed
    assert lab.record().state is State.APPLYING


def test_a_stage_of_another_link_or_point(kept: tuple[Lab, bytes]) -> None:
    lab, _ = kept
    saved = lab.disks.name("saved")
    shutil.copytree(lab.folder, saved)
    for change in (edit("link", "link-2"), edit("base.epoch", 7), edit("base.time", 1.5)):
        shutil.copytree(saved, lab.folder, dirs_exist_ok=True)
        change(lab.folder)
        assert lab.record().next is None
        assert lab.has_settled() == 0
        assert lab.holds(lab.old)


def test_a_stage_of_a_newer_version(kept: tuple[Lab, bytes]) -> None:
    lab, new = kept
    edit("format", 2)(lab.folder)
    for touch in (lab.open, lambda: finish(str(lab.target), lab.order.paths)):
        with pytest.raises(BlktrackError, match="newer blktrack") as caught:
            touch()
        assert "upgrade" in caught.value.hint
    edit("format", 1)(lab.folder)
    edit("unknown", 1)(lab.folder)
    assert lab.has_settled() == 1
    assert lab.holds(new)


def test_full_while_staging(disks: Disks, seed: int) -> None:
    lab = Lab(disks, "tmpfs", seed)
    room = disks.attach(None, "tmpfs", "-o", "size=4m")
    shutil.copytree(lab.folder, room, dirs_exist_ok=True)
    shutil.rmtree(lab.folder)
    lab.folder.symlink_to(room)
    before = os.statvfs(room).f_bfree
    lab.put(os.urandom(SIZE))
    lab.order = dataclasses.replace(lab.order, extents=[[0, SIZE]], epoch=1)
    with pytest.raises(
        CopyFailed, match=r"cannot write .*incoming.pack.*: No space left"
    ) as caught:
        bring(lab.order)
    assert caught.value.exit_code == 1 and "free space" in caught.value.hint
    assert not is_left(lab.folder)
    assert os.statvfs(room).f_bfree == before
    assert lab.has_settled() == 0
    assert lab.holds(lab.old)


def test_a_seal_that_fails_at_any_step(
    disks: Disks, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: what cannot be made durable is no commit."""
    lab = Lab(disks, "tmpfs", seed)
    lab.change()
    fsync = os.fsync
    for turn in itertools.count():
        left = iter([False] * turn + [True])

        def fail_once(fd: int, left: Iterator[bool] = left) -> None:
            if next(left, False):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(fd)

        with lab.open() as replica, monkeypatch.context() as patch, contextlib.ExitStack() as after:
            after.callback(lambda: patch.setattr(os, "fsync", fsync))
            stage = after.enter_context(replica.stage())
            with open_end(str(lab.source)) as source:
                copy(source, stage.end, lab.extents)
            patch.setattr(os, "fsync", fail_once)
            try:
                stage.seal(lab.extents, point(1))
                break
            except BlktrackError as error:
                assert "No space left" in str(error)
        assert not is_left(lab.folder)
        assert lab.record().point == point(0)
    assert turn == 5, "image, list, its folder, header, its folder"
