"""What `send` and `recv` refuse: a delta that is not whole or does not fit, and wrong words."""

from __future__ import annotations

import os
import pty
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.errors import BlktrackError
from blktrack.options import Options
from blktrack.ship.delta.format import MAGIC
from blktrack.ship.stage import is_left
from blktrack.units import KIB, MIB
from tests.blockdev import TOP, Done, Lab, read_image
from tests.streams import LINK, SIZE, Hosts, hosts

__all__ = ["hosts"]  # a fixture

pytestmark = pytest.mark.needs("root", "loop", "bpf")


def flipped(delta: bytes) -> bytes:
    data = bytearray(delta)
    data[len(data) // 2] ^= 1
    return bytes(data)


def newer(delta: bytes) -> bytes:
    """Of the next version, with the checksum that it would have."""
    from blktrack.ship.delta.format import PREAMBLE, _seal

    fields = list(PREAMBLE.unpack(delta[: PREAMBLE.size]))
    fields[1] += 1
    return _seal(PREAMBLE.pack(*fields)) + delta[PREAMBLE.size :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "the delta is empty"),
    "no delta": (lambda _: b"\x89PNG\r\n\x1a\n" * 9, "this is not a delta"),
    "cut in its header": (lambda delta: delta[:50], "the delta ends after 50 bytes"),
    "cut before its trailer": (lambda delta: delta[:-300], "the delta ends after"),
    "cut in its digest": (lambda delta: delta[:-1], "the delta ends after"),
    "damaged": (flipped, "the delta is damaged"),
    "newer": (newer, "the delta needs a newer blktrack"),
    "with more behind it": (lambda delta: delta + b"x", "something follows its trailer"),
    "doubled": (lambda delta: delta + delta, "something follows its trailer"),
}


def test_what_recv_refuses_changes_nothing(hosts: Hosts) -> None:
    hosts.change(MIB, 2 * MIB)
    delta, _ = hosts.sent()
    before, image = hosts.replica(), read_image(hosts.target).copy()
    seen = hosts.target.stat().st_mtime_ns
    for name, (damage, message) in DAMAGES.items():
        done = hosts.recv(damage(delta))
        assert done.code == 1, name
        assert message in done.err and "  -> " in done.err, f"{name}: {done.err}"
        assert "Traceback" not in done.err and not done.out
        assert (read_image(hosts.target) == image).all()
        assert hosts.replica() == before, name
        assert hosts.target.stat().st_mtime_ns == seen
    assert delta.startswith(MAGIC)
    hosts.received(delta)
    assert hosts.identical()


def test_mutated_deltas_change_nothing(hosts: Hosts, seed: int) -> None:
    """Bits flipped, parts lost, repeated, exchanged or put in: each is refused."""
    for number in range(24):
        hosts.change(number * 640 * KIB, 4 * KIB, number=number + 2)
    delta, _ = hosts.sent()
    before, image, chance = hosts.replica(), read_image(hosts.target).copy(), random.Random(seed)
    for _ in range(400):
        data = bytearray(delta)
        for _ in range(chance.choice([1, 1, 1, 4])):
            start = chance.randrange(len(data))
            part = data[start : start + chance.choice([1, 48, 4096 + 48])]
            match chance.randrange(4):
                case 0:
                    data[start] ^= 1 << chance.randrange(8)
                case 1:
                    del data[start : start + len(part)]
                case 2:
                    data[start:start] = part
                case 3:
                    data[start : start + len(part)] = chance.randbytes(len(part))
        if data == delta:
            continue
        with pytest.raises(BlktrackError):
            hosts.received(bytes(data))
        assert not is_left(Path(f"{hosts.target}.blktrack"))
    assert (read_image(hosts.target) == image).all()
    assert hosts.replica() == before
    hosts.received(delta)
    assert hosts.identical()


def test_a_delta_that_starts_elsewhere(hosts: Hosts) -> None:
    hosts.change(MIB)
    first, report = hosts.sent()
    hosts.received(first)
    done = hosts.recv(first)  # again
    assert done.code == 1 and f"is at epoch {report.epoch}" in done.err
    assert f"--commit {report.epoch}" in done.err
    hosts.commit(report.epoch)
    hosts.change(2 * MIB)
    second, report = hosts.sent()
    hosts.commit(report.epoch)  # by mistake: it was never received
    hosts.change(3 * MIB)
    third, _ = hosts.sent()
    done = hosts.recv(third)
    assert done.code == 1 and "the delta starts at epoch" in done.err and "--full" in done.err
    hosts.received(second)
    hosts.received(third)
    assert hosts.identical()


def test_a_full_copy_that_leads_back(hosts: Hosts) -> None:
    old, report = hosts.sent(Options(full=True))
    image = read_image(hosts.source).copy()
    hosts.change(MIB)
    hosts.carry(Options(full=True))
    done = hosts.recv(old)
    assert done.code == 1 and f"leads back to epoch {report.epoch}" in done.err
    assert hosts.identical()
    assert hosts.recv(old, "--force").json["epoch"] == report.epoch
    assert (read_image(hosts.target) == image).all()


def test_a_delta_for_another_replica(hosts: Hosts, shared: Lab) -> None:
    other = Hosts(shared, SIZE)
    full, _ = other.sent()
    other.received(full)
    image, before = read_image(hosts.target).copy(), hosts.replica()
    for delta in (full, other.sent()[0]):
        done = hosts.recv(delta)
        assert done.code == 1
        assert "belongs to another link of" in done.err and "--force" in done.err
    hosts.change(MIB)
    delta, _ = hosts.sent()
    fresh = shared.name("fresh")
    done = hosts.recv(delta, target=fresh)
    assert done.code == 1 and "is not a replica of" in done.err and "--full" in done.err
    assert not fresh.exists()
    assert (read_image(hosts.target) == image).all()
    assert hosts.replica() == before
    # What is not a replica at all is not taken either.
    fresh.write_bytes(b"precious")
    done = hosts.recv(full, target=fresh)
    assert done.code == 1 and "is a file with data in it" in done.err
    assert fresh.read_bytes() == b"precious"


def test_a_replica_that_others_wrote_to(hosts: Hosts) -> None:
    with hosts.target.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"rude")
    hosts.change(MIB)
    done = hosts.recv(hosts.sent()[0])
    assert done.code == 1 and "is not as it was left: it was written to" in done.err
    assert hosts.replica().state == "changed"
    hosts.carry(Options(full=True))
    assert hosts.identical()
    assert hosts.replica().state == "ready"


def test_targets_that_cannot_hold_it(hosts: Hosts, shared: Lab) -> None:
    delta, _ = hosts.sent(Options(full=True))
    small = shared.loop(SIZE - MIB)
    done = hosts.recv(delta, target=small)
    assert done.code == 1 and "is too small" in done.err
    done = hosts.recv(delta, target=hosts.lab.folder)
    assert done.code == 1 and "is a directory" in done.err
    hosts.change(5 * MIB, 512)
    coarse = Hosts(shared, SIZE, target=shared.loop(SIZE, sector=4096))
    coarse.carry()
    coarse.change(5 * MIB, 512)
    coarse.carry()  # granules are large enough
    assert coarse.identical()


@pytest.mark.parametrize("words", [["send", "DEVICE", "--link", "x"], ["recv", "TARGET"]])
def test_a_terminal_is_no_stream(hosts: Hosts, words: list[str]) -> None:
    words = [{"DEVICE": hosts.source, "TARGET": str(hosts.target)}.get(w, w) for w in words]
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "blktrack", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=TOP,
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert "terminal" in done.stderr and "  -> " in done.stderr


def test_wrong_words(hosts: Hosts) -> None:
    def refused(*words: str) -> Done:
        done = hosts.lab.blktrack("send", *words)
        assert done.code in (2, 3)
        assert "Traceback" not in done.err
        return done

    assert "--link" in refused(hosts.source).err
    assert "is empty" in refused(hosts.source, "--link", "").err
    for level in ("0", "20", "x", "-1"):
        assert "level" in refused(hosts.source, "--link", LINK, "--compress", level).err
    assert "is not tracked" in refused(hosts.lab.loop(SIZE), "--link", LINK).err
