"""Generations and pending sets as commands begin, end and tell them, on one device and on many."""

from __future__ import annotations

import pytest

from blktrack.bpf import abi, kernel
from blktrack.errors import BlktrackError
from blktrack.units import GIB, KIB, MIB
from tests import sectors
from tests.blockdev import Lab, Watch, pairs, read_image, wait_until
from tests.test_retired import load
from tests.tracked import write

pytestmark = pytest.mark.needs("root", "loop", "bpf")

# What design promises of each; there may be more.
DEVICE_KEYS = {
    "device",
    "size",
    "granularity",
    "state",
    "reason",
    "generation",
    "epoch",
    "dirty_bytes",
    "written_bytes",
    "writes",
    "losses",
    "links",
}
LINK_KEYS = {
    "target",
    "name",
    "epoch",
    "point",
    "consistency",
    "lag_s",
    "pending_bytes",
    "state",
}
EXTENTS_KEYS = {"device", "granularity", "generation", "epoch", "bytes", "extents"}


def test_a_second_track_changes_nothing(shared: Lab) -> None:
    device = shared.loop(16 * MIB)
    first = shared.blktrack("track", device, "--json").json
    assert first["began"]
    write(device, MIB)
    before = shared.status(device)
    second = shared.blktrack("track", device, "--json").json
    assert second == first | {"began": False}
    assert shared.blktrack("track", device, "--granularity", "4K").code == 0
    assert shared.status(device) == before
    assert shared.blktrack("extents", device, "--json").json["extents"] == [[MIB, 4 * KIB]]


def test_another_granularity_is_refused(shared: Lab) -> None:
    device = shared.loop(16 * MIB)
    watch = shared.track(device)
    done = shared.blktrack("track", device, "--granularity", "64K")
    assert done.code == 1
    assert "4 KiB" in done.err
    assert "untrack it first" in done.err
    write(device, MIB)
    assert pairs(watch.take()) == [(MIB, 4 * KIB)]


def test_untracking_ends_the_generation(lab: Lab) -> None:
    device, replica = lab.loop(16 * MIB), lab.name("replica")
    first = lab.blktrack("track", device, "--json").json["generation"]
    lab.sync(device, replica)
    assert lab.blktrack("untrack", device).code == 0
    assert not lab.store.paths.pins.exists(), "nothing stays in the kernel"
    for words in (["extents", device], ["sync", device, str(replica)]):
        assert (lab.blktrack(*words).code, words) == (3, words)
    write(device, MIB)  # unseen
    second = lab.blktrack("track", device, "--json").json
    assert second["began"]
    assert second["generation"] != first
    (link,) = lab.status(device)["links"]
    assert (link["state"], link["reason"]) == ("resync", "it was untracked")
    assert lab.blktrack("sync", device, replica, "--no-resync").code == 3
    assert lab.sync(device, replica).mode == "resync"
    assert not sectors.faults(read_image(device), read_image(replica))


def test_json_has_the_promised_keys(shared: Lab) -> None:
    device, replica = shared.loop(16 * MIB), shared.name("replica")
    shared.track(device)
    shared.sync(device, replica)
    write(device, MIB, 8 * KIB)
    write(device, 3 * MIB)
    (found,) = shared.blktrack("status", device, "--json").json["devices"]
    assert set(found) >= DEVICE_KEYS
    assert (found["device"], found["size"], found["granularity"]) == (device, 16 * MIB, 4 * KIB)
    assert (found["state"], found["reason"], found["losses"]) == ("tracking", "", 0)
    assert (found["dirty_bytes"], found["written_bytes"], found["writes"]) == (12288, 12288, 2)
    (link,) = found["links"]
    assert set(link) >= LINK_KEYS
    assert (link["target"], link["name"]) == (str(replica), replica.name)
    assert (link["state"], link["pending_bytes"]) == ("ready", 12 * KIB)
    assert link["consistency"] == "crash"
    assert 0 < link["lag_s"] < 600
    for words in ([], ["--target", str(replica)], ["--target", replica.name]):
        listed = shared.blktrack("extents", device, "--json", *words).json
        assert set(listed) >= EXTENTS_KEYS
        assert listed["generation"] == found["generation"]
        assert listed["epoch"] == found["epoch"]
        assert listed["extents"] == [[MIB, 8 * KIB], [3 * MIB, 4 * KIB]]
        assert listed["bytes"] == 12 * KIB


def test_status_without_devices(lab: Lab) -> None:
    assert lab.blktrack("status", "--json").json == {"devices": [], "replicas": []}


def test_links_have_their_own_pending_sets(shared: Lab) -> None:
    device = shared.loop(16 * MIB)
    one = shared.track(device)
    other = Watch(shared.store, device, "other")
    write(device, MIB)
    assert pairs(one.take()) == [(MIB, 4 * KIB)]
    write(device, 2 * MIB)
    assert pairs(one.take()) == [(2 * MIB, 4 * KIB)]
    assert pairs(other.take()) == [(MIB, 4 * KIB), (2 * MIB, 4 * KIB)]
    assert pairs(one.take()) == pairs(other.take()) == []


def test_instances_do_not_meet(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees every change, and ending one leaves the other alone."""
    device = lab.loop(16 * MIB)
    watch = lab.track(device)
    with monkeypatch.context() as patch:
        patch.setenv("BLKTRACK_ROOT", str(lab.folder / "second"))
        second = Lab(lab.folder / "second", lab.stack)
        lab.stack.callback(kernel.remove, second.store.paths.pins)
        other = second.track(device)
        write(device, MIB)
        assert pairs(other.take()) == [(MIB, 4 * KIB)]
        second.untrack(device)
    write(device, 3 * MIB)
    assert pairs(watch.take()) == [(MIB, 4 * KIB), (3 * MIB, 4 * KIB)]


def test_sixty_four_devices_and_no_more(lab: Lab) -> None:
    disk = lab.loop(65 * MIB)
    parts = [lab.partition(disk, n + 1, n * MIB, MIB) for n in range(abi.SLOTS + 1)]
    watches = [lab.track(part) for part in parts[:-1]]
    with pytest.raises(BlktrackError, match="64 devices are tracked already") as refusal:
        lab.track(parts[-1])
    assert "untrack" in refusal.value.hint
    write(disk, MIB - 8 * KIB, 16 * KIB)
    write(disk, 63 * MIB, 2 * MIB)
    found = [pairs(watch.take()) for watch in watches]
    assert found[0] == [(MIB - 8 * KIB, 8 * KIB)]
    assert found[1] == [(0, 8 * KIB)]
    assert not any(found[2:63])
    assert found[63] == [(0, MIB)]
    lab.untrack(parts[5])
    lab.track(parts[-1])


@pytest.mark.needs("fio")
def test_status_reads_maps_in_use(shared: Lab) -> None:
    """Many words, set while they are scanned. Discards take no memory."""
    device = shared.loop(64 * GIB)
    shared.track(device, 4 * KIB)
    with load(device, "--rw=randtrim", "--norandommap", "--time_based", "--runtime=1h"):
        wait_until(lambda: shared.status(device)["writes"] > 1000, "the load")
        for _ in range(60):
            shared.status(device)
