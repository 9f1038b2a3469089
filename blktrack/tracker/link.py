"""The sets of one link: what it has to ship, and how bits move towards the replica.

`pending` collects what drains find; `shipping` is what the sync under way has taken from it. A bit
leaves `shipping` only when the replica holds its granule durably, or when `held` has it: what a
stage on the replica's side holds that is not sealed. Such a stage survives the sync that filled it,
and the next one goes on with it. What is in `shipping` as well has changed since it was staged.
"""

from __future__ import annotations

import contextlib
from typing import Self

import numpy as np

from blktrack import bitmap, crash, extent, linux
from blktrack.bitfile import BitFile
from blktrack.bitmap import Words
from blktrack.extent import ExtentArray
from blktrack.state import LinkState
from blktrack.tracker.tracking import Tracking


class LinkSets:
    """Open sets of a link. FileNotFoundError if they are gone and `create` is not set.

    `take`, `fill`, `give_back` and `make_held` are called under the device's lock, so that no drain
    and no growth is in the middle.
    """

    def __init__(self, tracking: Tracking, link: LinkState, *, create: bool = False) -> None:
        self._folder = folder = tracking.store.link_run(tracking.state.id, link.id)
        self.granularity, self.size = tracking.state.granularity, tracking.state.size
        self.granules = tracking.window.geometry.granules
        self._racing: BitFile | None = None
        self._held: BitFile | None = None
        if link.stage and not create:
            (folder / "held").stat()  # without it nobody knows what its stage has
        self.shipping = BitFile(folder / "shipping", tracking.words, create=create)
        crash.point("sets-half")
        # Made last: drains find a link by this file.
        self.pending = BitFile(folder / "pending", tracking.words, create=create)

    def take(self) -> ExtentArray:
        """Move what is pending into the set to ship; all that is to be shipped now."""
        if len(self.shipping.nonzero()) or not self._exchange():
            found = self.pending.nonzero()
            bitmap.or_into(self.shipping.reserve(found), self.pending.words, found)
            crash.point("take-added")
            self.pending.clear()
        crash.point("take-done")
        return self.extents()

    def take_more(self) -> ExtentArray:
        """The same in a sync that has taken before: only what was pending, and is now to ship."""
        found = self.pending.nonzero()
        extents = bitmap.extents(self.pending.words, self.granularity, self.size, found)
        bitmap.or_into(self.shipping.reserve(found), self.pending.words, found)
        crash.point("more-added")
        self.pending.clear()
        return extents

    def watch(self) -> None:
        """From now on have drains, which others may make, add to `racing` what was submitted."""
        if self._racing is None:
            self._racing = BitFile(self._folder / "racing", len(self.pending.words), create=True)
        else:
            self._racing.clear()

    def raced(self, live: Words) -> ExtentArray:
        """What was submitted since the last `watch`; `live` is what the maps know of it."""
        found: Words = np.array(live)
        if self._racing is not None:
            bitmap.or_into(found, self._racing.words, self._racing.nonzero())
        return bitmap.extents(found, self.granularity, self.size)

    def _exchange(self) -> bool:
        """Let the sets change places: the kernel takes long to make the pages of a copy."""
        try:
            linux.exchange(self._folder / "pending", self._folder / "shipping")
        except OSError:  # a file system that cannot
            return False
        self.pending, self.shipping = self.shipping, self.pending
        return True

    def fill(self) -> None:
        """Everything has to be shipped or compared."""
        bitmap.set_range(self.shipping.reserve(), 0, self.granules)
        crash.point("fill-set")
        self.pending.clear()
        if held := self._open_held():
            held.clear()
        crash.point("fill-done")

    def extents(self) -> ExtentArray:
        words = self.shipping.words
        return bitmap.extents(words, self.granularity, self.size, self.shipping.nonzero())

    def shipped(self, done: ExtentArray) -> None:
        """These extents are durable on the replica."""
        self.shipping.clear_extents(self.granularity, self.size, done)

    def all_shipped(self) -> None:
        """The replica has all that was taken, and all that was staged for it."""
        if held := self._open_held():
            held.clear()
            crash.point("held-cleared")
        self.shipping.clear()

    def make_held(self) -> None:
        """Make `held`, unless it is there, for `staged`."""
        if self._open_held() is None:
            self._held = BitFile(self._folder / "held", len(self.pending.words), create=True)

    def staged(self, done: ExtentArray) -> None:
        """These extents are durable in the stage. ValueError without `make_held`."""
        held = self._open_held()
        if held is None:
            raise ValueError("there is no set for what a stage holds")
        words = held.reserve(bitmap.words_of(self.granularity, self.size, done))
        bitmap.set_extents(words, self.granularity, self.size, done)
        crash.point("held-added")
        self.shipped(done)

    def held_extents(self) -> ExtentArray:
        """What the stage holds that is to be sealed in it."""
        if (held := self._open_held()) is None:
            return extent.empty()
        return bitmap.extents(held.words, self.granularity, self.size, held.nonzero())

    def give_back(self) -> None:
        """The stage is gone: what it held has to be shipped."""
        if (held := self._open_held()) and len(found := held.nonzero()):
            bitmap.or_into(self.shipping.reserve(found), held.words, found)
            crash.point("held-returned")
            held.clear()

    def _open_held(self) -> BitFile | None:
        """None while there is no such set: another process may make it."""
        if self._held is None:
            with contextlib.suppress(FileNotFoundError):
                self._held = BitFile(self._folder / "held", len(self.pending.words))
        return self._held

    def union(self, live: Words, *, held: bool = True) -> Words:
        """What the next sync would ship, `live` being the maps' content, read before this call;
        without `held` only what no stage holds for it.

        Bits move from map to `pending` to `shipping` to `held`; reading in that order misses none.
        """
        found: Words = np.array(live)
        bitmap.or_into(found, self.pending.words, self.pending.nonzero())
        bitmap.or_into(found, self.shipping.words, self.shipping.nonzero())
        if held and (kept := self._open_held()):
            bitmap.or_into(found, kept.words, kept.nonzero())
        return found

    def close(self) -> None:
        self.pending.close()
        self.shipping.close()
        if self._held is not None:
            self._held.close()
        if self._racing is not None:
            self._racing.close()
            (self._folder / "racing").unlink(missing_ok=True)
            self._racing = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
