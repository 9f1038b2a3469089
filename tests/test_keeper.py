"""The keeper against sources that say what they may not, in the wrong order, or nothing any more:
it ends with a word why, and a replica that has a point keeps it."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from blktrack.ship.keeper import _told
from tests import handmade as made
from tests.keepers import (
    HELLO,
    KEY,
    LINK,
    SIZE,
    UNIT,
    Keeper,
    Replica,
    ask,
    begin,
    commit,
    compare,
    digest,
    open_,
    point,
    replica,
    seal,
    stage,
    untouched,
    words,
    write,
    zero,
)
from tests.loopdev import Disks
from tests.test_wire_message import mutate

__all__ = ["replica", "untouched"]  # the fixtures

PAGE = 4096
FLUSH = ask(made.FLUSH, 3)
APPLY = ask(made.APPLY, 5)
# An increment to point 8: data and zeroes.
ROWS = [(PAGE, 3 * PAGE)]
BLOCK = b"blktrack" * 512


def increment(target: Path) -> list[bytes]:
    """All that leads to point 8, but for its application."""
    parts = [write(PAGE, BLOCK), write(3 * PAGE, BLOCK), zero((2 * PAGE, PAGE))]
    return [open_(target), stage(2), *parts, FLUSH, seal(4, 8, ROWS)]


def bring(image: bytearray) -> None:
    image[PAGE : 2 * PAGE] = image[3 * PAGE : 4 * PAGE] = BLOCK
    image[2 * PAGE : 3 * PAGE] = bytes(PAGE)


# What may be said.


def test_a_copy_in_place(replica: Replica) -> None:
    packed = zstandard.ZstdCompressor().compress(BLOCK * 16)
    rows = [(8 * PAGE, 15 * PAGE), (40 * PAGE, PAGE)]
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), ask(made.ROOM, 2), begin(3))
        keeper.send(made.message(made.WRITE, 0, rows, packed, codec=1, length=16 * PAGE))
        keeper.send(zero((0, PAGE), (SIZE - 100, 100)), write(5, b"five"))
        keeper.send(ask(made.FLUSH, 4), commit(5, 8))
        end = keeper.end()
    assert (end.code, end.err) == (0, "")
    opened, *others = end.answers()
    assert (opened["record"]["point"], opened["changed"]) == (point(7), "")
    assert others == [{}, {"size": SIZE}, {"mark": 0}, {}]
    for start, length in rows:
        replica.image[start : start + length] = BLOCK * (length // PAGE)
    replica.image[:PAGE], replica.image[-100:] = bytes(PAGE), bytes(100)
    replica.image[5:9] = b"five"
    replica.assert_at(8)


def test_an_increment(replica: Replica) -> None:
    with replica.keeper() as keeper:
        keeper.send(*increment(replica.target))
        keeper.answer(4)
        replica.assert_at(7)
        keeper.send(APPLY)
        end = keeper.end()
    assert (end.code, end.err) == (0, "")
    bring(replica.image)
    replica.assert_at(8)
    told = [json.loads(data) for kind, _, data in end.said if kind == made.PROGRESS]
    assert all(set(word) <= {"phase", "total", "done", "warn"} for word in told)


def test_a_sealed_increment_is_finished_by_the_next_connection(replica: Replica) -> None:
    with replica.keeper() as keeper:
        keeper.send(*increment(replica.target))
        assert keeper.end().code == 0
    replica.assert_at(7)
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target))
        end = keeper.end()
    assert end.answers()[0]["record"]["point"] == point(8)
    bring(replica.image)
    replica.assert_at(8)


def test_an_increment_is_gone_on_with(replica: Replica) -> None:
    """What was flushed is there for the next connection; what was not, may be sent again."""
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), stage(2), write(PAGE, BLOCK), FLUSH)
        mark = json.loads(keeper.answer(3))["mark"]
        keeper.send(write(2 * PAGE, bytes(PAGE)), made.message(made.PING))
        keeper.kill()
        keeper.ended()
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target))
        found = json.loads(keeper.answer(1))
        id_ = found["stage"]
        assert found["mark"] >= mark > 0
        keeper.send(stage(2, id_), zero((2 * PAGE, PAGE)), write(3 * PAGE, BLOCK))
        keeper.send(seal(4, 8, ROWS), APPLY)
        end = keeper.end()
    assert (end.code, end.err) == (0, "")
    assert end.answers()[1]["id"] == id_
    assert end.answers()[1]["folder"] == str(replica.folder)
    bring(replica.image)
    replica.assert_at(8)


def test_another_increment_drops_the_one_that_was_left(replica: Replica) -> None:
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), stage(2), write(0, BLOCK), FLUSH)
        assert keeper.end().code == 0
    other = "00000000-0000-4000-8000-000000000000"
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), stage(2, other), write(PAGE, BLOCK))
        keeper.send(write(3 * PAGE, BLOCK), zero((2 * PAGE, PAGE)), seal(4, 8, ROWS), APPLY)
        end = keeper.end()
    opened, staged, *_ = end.answers()
    assert opened["stage"] not in ("", staged["id"]) and staged["id"] != other
    bring(replica.image)
    replica.assert_at(8)


def test_an_increment_of_a_source_that_has_grown_begins_anew(replica: Replica) -> None:
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), stage(2), write(0, BLOCK), FLUSH)
        assert keeper.end().code == 0
    size = SIZE + PAGE
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target))
        id_ = json.loads(keeper.answer(1))["stage"]
        keeper.send(made.spoken(made.STAGE, 2, {"resume": id_, "size": size}), write(SIZE, BLOCK))
        keeper.send(seal(3, 8, [(SIZE, PAGE)]), APPLY)
        end = keeper.end()
    assert (end.code, end.err) == (0, "")
    assert end.answers()[1]["id"] != id_
    replica.image += BLOCK
    replica.assert_at(8)


def test_a_comparison(untouched: Replica) -> None:
    rows = [(0, UNIT), (3 * UNIT + 512, 1000), (SIZE - 1, 1)]
    ours = [bytes(untouched.image[start : start + length]) for start, length in rows]
    ours[1] = ours[1][:600] + b"?" + ours[1][601:]
    with untouched.keeper() as keeper:
        keeper.send(open_(untouched.target, writable=False), compare(2, rows, ours, 512))
        found = keeper.answer(2)
        end = keeper.end()
    assert (end.code, end.err) == (0, "")
    theirs = bytes(untouched.image[3 * UNIT + 512 :][:1000])
    assert found == b"\1\0\0\0" + digest(theirs[:512]) + digest(theirs[512:])
    untouched.assert_at(7)


def test_a_new_replica(tmp_path: Path) -> None:
    made_new = Replica(tmp_path / "root", tmp_path / "new.img")
    with made_new.keeper() as keeper:
        keeper.send(open_(made_new.target))
        opened = json.loads(keeper.answer(1))
        assert (opened["record"], opened["blank"], opened["size"]) == (None, True, SIZE)
        assert (opened["link"], opened["stage"]) == (LINK, "")
        assert made_new.target.exists()
        assert keeper.end().code == 0
    assert not made_new.target.exists(), "it was never begun"


def test_the_line_that_it_begins_with(untouched: Replica) -> None:
    with untouched.keeper(hello=None) as keeper:
        line = keeper.take_line()
        assert line.startswith(b"blktrack-recv protocol=1-1 version=")
        keeper.send(HELLO)
        assert keeper.end().code == 0


# What may not be said. Each is told to the keeper of a replica that is at a point.

Case = Callable[[Replica], list[bytes]]


def opened(*messages: bytes, **other: object) -> Case:
    return lambda replica: [open_(replica.target, **other), *messages]


def without(key: str) -> Case:
    def say(replica: Replica) -> list[bytes]:
        value = words(replica.target)
        del value[key]
        return [made.spoken(made.OPEN, 1, value)]

    return say


def raw(data: bytes) -> Case:
    return lambda replica: [made.message(made.OPEN, 1, data=data)]


def plain(*messages: bytes) -> Case:
    return lambda replica: list(messages)


WRONG: dict[str, tuple[Case, str]] = {
    # Out of order.
    "write first": (plain(write(0, b"x")), "it writes before it has begun"),
    "zero first": (plain(zero((0, 1))), "it writes before it has begun"),
    "flush first": (plain(FLUSH), "it flushes before it has begun"),
    "compare first": (plain(compare(2, [(0, 1)], [b"x"], 512)), "it compares what is not there"),
    "room first": (plain(ask(made.ROOM, 2)), "it has opened no replica"),
    "begin first": (plain(begin(2)), "it has opened no replica"),
    "stage first": (plain(stage(2)), "it has opened no replica"),
    "commit first": (plain(commit(2, 9)), "it has opened no replica"),
    "seal first": (plain(seal(2, 9, [])), "it seals no stage"),
    "apply first": (plain(APPLY), "it applies no sealed stage"),
    "two targets": (opened(made.spoken(made.OPEN, 2, {})), "it opens a second target"),
    "two to be read": (
        opened(made.spoken(made.OPEN, 2, {}), writable=False),
        "it opens a second target",
    ),
    "write before begin": (opened(write(0, b"x")), "it writes before it has begun"),
    "zero before begin": (opened(zero((0, SIZE))), "it writes before it has begun"),
    "flush before begin": (opened(FLUSH), "it flushes before it has begun"),
    "seal before stage": (opened(seal(2, 9, [])), "it seals no stage"),
    "apply before stage": (opened(APPLY), "it applies no sealed stage"),
    "apply before seal": (opened(stage(2), write(0, b"x"), APPLY), "it applies no sealed stage"),
    "commit what is staged": (
        opened(stage(2), write(0, b"x"), commit(3, 9)),
        "it commits what is staged",
    ),
    "write to what is read": (opened(write(0, b"x"), writable=False), "before it has begun"),
    "begin what is read": (opened(begin(2), writable=False), "it has opened no replica"),
    "stage for what is read": (opened(stage(2), writable=False), "it has opened no replica"),
    "commit what is read": (opened(commit(2, 9), writable=False), "it has opened no replica"),
    "an answer": (opened(made.spoken(made.DONE, 1, {})), "it sends DONE"),
    "a failure": (plain(made.spoken(made.FAILED, 1, {})), "it sends FAILED"),
    "digests": (plain(made.message(made.DIGESTS, 1)), "it sends DIGESTS"),
    # Beyond the end, or nowhere.
    "stage beyond the end": (
        opened(stage(2), write(SIZE - 1, b"xy")),
        f"it writes {SIZE - 1}+2 of {SIZE} bytes",
    ),
    "zero beyond the end": (opened(stage(2), zero((0, SIZE + 1))), f"0+{SIZE + 1} of {SIZE}"),
    "zero to where sums end": (
        opened(stage(2), zero((2**63 - 1, 2**63 - 1))),
        f"it writes {2**63 - 1}+{2**63 - 1} of",
    ),
    "one of many beyond the end": (
        opened(stage(2), zero((0, 1), (SIZE, 1))),
        f"it writes {SIZE}+1 of {SIZE} bytes",
    ),
    "compare beyond the end": (
        opened(compare(2, [(SIZE - 1, 2)], [b"xy"], 512)),
        "it compares what is not there",
    ),
    "compare less than a sector": (opened(compare(2, [(0, 1)], [b"x"], 511)), "than a sector"),
    "compare with too few digests": (
        opened(compare(2, [(0, UNIT + 1)], [b"x"], 512)),
        "it has not sent as many digests as units",
    ),
    "compare with no granularity": (
        opened(made.message(made.COMPARE, 2, [(0, 1)], b"")),
        "it compares less than a sector",
    ),
    # What is sealed.
    "seal something else": (
        opened(stage(2), write(0, b"x"), seal(3, 9, [(0, 2)])),
        "what it seals is not what was staged",
    ),
    "seal nothing": (
        opened(stage(2), write(0, b"x"), seal(3, 9, [])),
        "what it seals is not what was staged",
    ),
    "seal no point": (
        opened(stage(2), write(0, b"x"), ask(made.SEAL, 3, extents="", point=None)),
        "what it seals is not what was staged",
    ),
    "begin with another state": (opened(begin(2, "ready")), "it begins with 'ready'"),
    "begin with a word": (opened(begin(2, "x")), "it begins with 'x'"),
    "commit no point": (
        opened(ask(made.COMMIT, 2, point={"epoch": 9})),
        "its COMMIT's point has no 'consistency'",
    ),
    "commit a point before the beginning": (
        opened(ask(made.COMMIT, 2, point={**point(9), "epoch": -1})),
        "its COMMIT's point has a bad 'epoch'",
    ),
    "no size": (opened(made.spoken(made.ROOM, 2, {})), "its ROOM has no 'size'"),
    # What is opened.
    "a short key": (opened(key="00" * 31), "its OPEN has a bad 'key'"),
    "a long key": (opened(key="00" * 33), "its OPEN has a bad 'key'"),
    "a key that is none": (opened(key="x" * 64), "its OPEN has a bad 'key'"),
    "a key that is a number": (opened(key=5), "its OPEN has a bad 'key'"),
    **{f"no {key}": (without(key), f"its OPEN has no '{key}'") for key in words("/x")
       if key not in ("link", "major", "minor")},
    "no words": (raw(b""), "its OPEN has no 'key'"),
    "no JSON": (raw(b"{"), "its OPEN is not a JSON object"),
    "no object": (raw(b"[1]"), "its OPEN is not a JSON object"),
    "no UTF-8": (raw(b'{"key":"\xff"}'), "its OPEN is not a JSON object"),
    "twice the same": (raw(b'{"key":"","key":""}'), "its OPEN is not a JSON object"),
    "too deep": (raw(b"[" * 60000), "its OPEN is not a JSON object"),
    "a number without an end": (raw(b'{"key":' + b"9" * 60000 + b"}"), "is not a JSON object"),
    "a source that is none": (opened(source=[]), "its OPEN has a bad 'source'"),
    "a source of nothing": (opened(source={"device": "", "name": "", "size": 0}), "a bad 'size'"),
    "a link that is none": (opened(link="../../x"), "its OPEN has a bad 'link'"),
    "a name with a line end": (lambda r: [open_(f"{r.target}\n")], "its OPEN has a bad 'target'"),
    "a name with half a letter": (lambda r: [open_(f"{r.target}\ud800")], "a bad 'target'"),
    "a name without an end": (lambda r: [open_("/" + "x" * 5000)], "a bad 'target'"),
    "a relative name": (lambda r: [open_("replica.img")], "replica.img is not a full path"),
    "no name": (lambda r: [open_("")], "is not a full path"),
    "a folder": (lambda r: [open_(r.target.parent)], "is a directory"),
    "a folder that is not there": (lambda r: [open_("/nowhere/x/y")], "cannot be created"),
    "too long a name": (lambda r: [open_("/" + "x" * 3000)], "File name too long"),
    "another link": (opened(link="00000000-0000-4000-8000-000000000000"), "belongs to another"),
    "another source": (
        lambda r: [open_(r.target, link=None, source={
            "device": "/dev/x", "name": "", "size": SIZE, "host": "other"})],
        "is a replica of /dev/vdb",
    ),
    # What is no message.
    "garbage": (plain(b"\0" * 4096), "the head of a message does not match its checksum"),
    "text": (plain(b"Killed by signal 15.\r\n" * 9), "the head of a message does not match"),
    "garbage after what is right": (opened(b"x" * 64), "the head of a message does not match"),
    "a second hello": (plain(HELLO * 2), "the head of a message does not match its checksum"),
    "a kind of tomorrow": (plain(made.message(99)), "a message of kind 99 and codec 0"),
    "a huge one": (
        opened(made.head(made.WRITE, count=1, stored=2**32 - 1)),
        "a message WRITE has 4294967295 bytes, and 4194304 are allowed",
    ),
    "a damaged one": (
        opened(stage(2), write(0, b"xyz")[:-1] + b"!"),
        "a message WRITE does not match its checksum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(untouched: Replica, name: str) -> None:
    say, why = WRONG[name]
    end = untouched.told(*say(untouched), made.message(made.PING), FLUSH)
    assert why in end.failed["message"]
    assert end.failed["exit"] == end.code == 1
    assert "BlktrackError" in end.failed["kinds"]
    assert end.failed["hint"], "what to do"
    assert why in end.err
    untouched.assert_at(7)


def test_what_it_says_is_text(tmp_path: Path) -> None:
    """Names on its host may have anything in them; a source takes only what prints."""
    odd = tmp_path / "odd\n\x1b[2J\udcff"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    end = Replica(tmp_path / "root", tmp_path).told(open_(tmp_path / "link/none/x"))
    assert "odd ?[2J?/none: No such file or directory" in end.failed["message"]
    assert all(end.failed[key].isprintable() for key in ("message", "hint"))


def test_wrong_after_a_seal(replica: Replica) -> None:
    old = bytes(replica.image)
    for last, why in (
        (write(1, b"x"), "it writes before it has begun"),
        (seal(4, 9, [(0, 1)]), "it seals no stage"),
        *[(one, "without what it has sealed") for one in (begin(4), stage(4), commit(4, 10))],
    ):
        end = replica.told(
            open_(replica.target), stage(2), write(0, b"x"), seal(3, 9, [(0, 1)]), last
        )
        assert why in end.failed["message"]
        replica.image[:] = old
        replica.assert_at(7)
        with replica.keeper() as keeper:  # what was sealed is sealed
            keeper.send(open_(replica.target), begin(2), write(0, old[:1]), commit(3, 7))
            assert keeper.end().answers()[0]["record"]["point"] == point(9)


def test_new_ones_wrong(tmp_path: Path) -> None:
    """What needs a point, asked of a target that has none."""
    target = tmp_path / "new.img"
    for say, why in (
        (stage(2), "it stages for a replica that is at no point"),
        (commit(2, 9), "it commits what has not begun"),
        (begin(2, "applying"), "it begins with 'applying'"),
    ):
        end = Replica(tmp_path / "root", target).told(open_(target), say)
        assert why in end.failed["message"]
        assert not target.exists()


def test_a_source_that_is_larger_than_a_file_may_be(tmp_path: Path) -> None:
    target = tmp_path / "new.img"
    source = {"device": "/dev/vdb", "name": "", "size": 2**63 - 1, "host": ""}
    end = Replica(tmp_path / "root", target).told(open_(target, source=source))
    assert str(target) in end.failed["message"]
    assert not target.exists()


def test_beyond_the_end_in_place(replica: Replica) -> None:
    end = replica.told(open_(replica.target), begin(2), write(SIZE, b"x"))
    assert f"it writes {SIZE}+1 of {SIZE} bytes" in end.failed["message"]
    record = replica.record
    assert record is not None and (record["state"], record["point"]) == ("unfinished", None)
    assert replica.content == replica.image


def test_begun_twice(replica: Replica) -> None:
    end = replica.told(open_(replica.target), begin(2), begin(3, "applying"))
    assert "it begins with 'applying'" in end.failed["message"], "it has left its point"
    end = replica.told(open_(replica.target), begin(2), stage(3))
    assert "it stages for a replica that is at no point" in end.failed["message"]


def test_an_increment_in_place_is_gone_on_with(replica: Replica) -> None:
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), begin(2, "applying"), write(PAGE, BLOCK))
        assert keeper.end().code == 0
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), begin(2, "applying"))
        keeper.send(zero((2 * PAGE, PAGE)), write(3 * PAGE, BLOCK), commit(3, 8))
        end = keeper.end()
    assert end.code == 0, end
    assert end.answers()[0]["record"]["state"] == "applying"
    bring(replica.image)
    replica.assert_at(8)


@pytest.mark.needs("root", "loop")
def test_blocks_of_a_device(disks: Disks) -> None:
    device = disks.loop(SIZE, sector=4096)
    found = Replica(disks.folder / "root", device)
    found.make()
    before = found.content
    for message in (write(512, bytes(512)), write(0, bytes(1000)), zero((0, 4095))):
        end = found.told(open_(device), begin(2), message)
        assert f"{device} has blocks of 4096 bytes" in end.failed["message"]
        assert end.failed["kinds"] == ["Refused", "BlktrackError"]
        assert found.content == before
    # Only to be compared it may be anything.
    with found.keeper() as keeper:
        keeper.send(open_(device, writable=False))
        keeper.send(compare(2, [(100, 900)], [bytes(before[100:1000])], 512))
        assert keeper.answer(2) == b""
        assert keeper.end().code == 0


def test_a_replica_that_is_in_use(replica: Replica) -> None:
    with replica.keeper() as first:
        first.send(open_(replica.target))
        first.answer(1)
        end = replica.told(open_(replica.target))
        assert end.failed["kinds"] == ["Busy", "BlktrackError"]
        assert end.failed["exit"] == end.code == 6
        first.send(*increment(replica.target)[1:], APPLY)
        assert first.end().code == 0
    bring(replica.image)
    replica.assert_at(8)


def test_restricted(untouched: Replica) -> None:
    folder = untouched.target.parent
    options = ("--serve", "--restrict", str(folder), "--max-size", "1M", "--max-staging", "64K")
    jailed = Replica(untouched.root, untouched.target, untouched.image, options)
    source = {"device": "/dev/vdb", "name": "", "size": SIZE + 1, "host": "far"}
    for messages, why in (
        ([open_("/etc/passwd")], "/etc/passwd is neither in"),
        ([open_(untouched.target, force=True)], "--force is not granted"),
        ([open_(folder / "x", source=source)], "may be no larger than"),
        (
            [open_(untouched.target), stage(2), *[write(0, bytes(UNIT))] * 3],
            "is larger than the 64 KiB that it may be",
        ),
    ):
        end = jailed.told(*messages)
        assert why in end.failed["message"]
        assert end.failed["hint"]
    assert not list(untouched.folder.glob("incoming*")), "what is too much is dropped"
    # Nor by a source that has grown since it was opened.
    for kind, words_ in ((made.BEGIN, {"state": "unfinished", "generation": "g1"}),
                         (made.STAGE, {"resume": ""}), (made.ROOM, {})):  # fmt: skip
        grown = made.spoken(kind, 2, {"size": SIZE + 1, **words_})
        end = jailed.told(open_(untouched.target), grown)
        assert "may be no larger than 1 MiB" in end.failed["message"]
    untouched.assert_at(7)


# What is no source, or is none any more.


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "it begins with 'GET / HTTP/1.1'"),
        (b"blktrack-sync protocol=2\n", "it wants protocol '2'"),
        (b"blktrack-sync protocol=1 patience=0\n", "its patience is '0'"),
        (bytes(4096), "it begins with"),
        (b"blktrack-sync proto", "the connection to the source was lost: it ended"),
        (b"", "the connection to the source was lost: it ended"),
    ],
)
def test_no_source(untouched: Replica, hello: bytes, why: str) -> None:
    with untouched.keeper(hello=hello) as keeper:
        end = keeper.end()
    end.assert_clean()
    assert end.code == 1 and why in end.err
    assert [kind for kind, _, _ in end.said] in ([], [made.ALIVE])


def test_it_ends_by_itself_where_the_source_goes_on(untouched: Replica) -> None:
    """The source that was told is waited for, but not for long."""
    with untouched.keeper() as keeper:
        keeper.send(FLUSH)
        end = keeper.ended()
    assert end.code == 1 and "before it has begun" in end.failed["message"]


def test_a_source_that_does_not_hear_is_freed(untouched: Replica) -> None:
    """It is in the middle of sending: what it sends is taken until it has seen the word."""
    with untouched.keeper() as keeper:
        blocks = [write(0, bytes(1 << 20))] * 64
        assert keeper.send(open_(untouched.target), FLUSH, *blocks), "without a broken pipe"
        end = keeper.end()
    assert end.code == 1 and "before it has begun" in end.failed["message"]


def test_a_silent_source_is_given_up(untouched: Replica) -> None:
    hello = b"blktrack-sync protocol=1 patience=1\n"
    with untouched.keeper(hello=hello) as keeper:
        keeper.send(open_(untouched.target), stage(2), write(PAGE, BLOCK))
        keeper.answer(2)
        end = keeper.ended()
    assert end.code == 0
    assert made.ALIVE in [kind for kind, _, _ in end.said]
    untouched.assert_at(7)
    with untouched.keeper() as keeper:
        keeper.send(open_(untouched.target))
        keeper.answer(1)
        assert keeper.end().code == 0, "nobody holds it"


def test_a_source_that_takes_nothing_is_given_up(untouched: Replica) -> None:
    """Answers fill its pipe; then it is silent, as a host is that lost its power."""
    hello = b"blktrack-sync protocol=1 patience=1\n"
    with Keeper(untouched.root, hello=hello, deaf=True) as keeper:
        keeper.send(open_(untouched.target))
        image = bytes(UNIT)  # is another in each unit: digests of all its sectors come back
        rows, data = [(index * UNIT, UNIT) for index in range(16)], [image] * 16
        keeper.send(*[compare(number, rows, data, 512) for number in range(2, 40)])
        assert keeper.process.wait(60) == 1
    untouched.assert_at(7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(replica: Replica, number: signal.Signals) -> None:
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target), stage(2), write(PAGE, BLOCK), FLUSH)
        keeper.answer(3)
        keeper.process.send_signal(number)
        end = keeper.ended()
    end.assert_clean()
    assert end.code == -number
    replica.assert_at(7)


def cuts(stream: bytes, seed: int, count: int) -> Iterator[int]:
    rng = random.Random(seed)
    yield from (0, len(stream) - 1)
    yield from (rng.randrange(len(stream)) for _ in range(count))


def goes_on(replica: Replica) -> None:
    """The next source brings the replica to point 9, whatever was left."""
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target))
        opened = json.loads(keeper.answer(1))
        changed = opened["changed"]
        assert changed == "", changed
        if opened["record"]["point"] == point(8):
            bring(replica.image)
        replica.assert_at(opened["record"]["point"]["epoch"])
        keeper.send(begin(2), write(0, bytes(replica.image)), commit(3, 9))
        end = keeper.end()
    assert end.code == 0, end
    replica.assert_at(9)


def test_the_end_at_any_byte(replica: Replica, seed: int) -> None:
    messages = increment(replica.target)
    stream = b"".join(messages)
    for cut in cuts(stream, seed, 8):
        with replica.keeper() as keeper:
            keeper.send(stream[:cut])
            end = keeper.end()
        end.assert_clean()
        assert (end.code, end.err) == (0, ""), cut
        assert made.FAILED not in [kind for kind, _, _ in end.said]
        replica.assert_at(7)
    goes_on(replica)


def test_the_end_at_any_byte_in_place(replica: Replica, seed: int) -> None:
    parts = [open_(replica.target), begin(2), write(PAGE, BLOCK), FLUSH, commit(3, 8)]
    for cut in cuts(b"".join(parts), seed, 5):
        with replica.keeper() as keeper:
            keeper.send(b"".join(parts)[:cut])
            end = keeper.end()
        end.assert_clean()
        assert (end.code, end.err) == (0, ""), cut
        record = replica.record
        assert record is not None and record["state"] in ("ready", "unfinished")
        if record["state"] == "ready":  # not begun
            replica.assert_at(7)
            continue
        assert cut >= len(parts[0]) + len(parts[1])
        replica.image[PAGE : 2 * PAGE] = replica.content[PAGE : 2 * PAGE]
        assert replica.content == replica.image
        with replica.keeper() as keeper:
            keeper.send(open_(replica.target), begin(2), commit(3, 7))
            assert keeper.end().code == 0
        replica.assert_at(7)


def test_killed_at_any_time(replica: Replica, seed: int) -> None:
    """After any answer or word of progress, and between: at its point, the old or the new."""
    rng = random.Random(seed)
    messages = [*increment(replica.target), APPLY]
    old = bytes(replica.image)
    for _ in range(7):
        with replica.keeper() as keeper:
            keeper.send(*messages[: rng.randrange(1, len(messages) + 1)])
            if rng.random() < 0.8:
                keeper.answer(1)
            keeper.kill()
            end = keeper.ended()
        end.assert_clean()
        with replica.keeper() as keeper:
            keeper.send(open_(replica.target))
            opened = json.loads(keeper.answer(1))
            assert opened["changed"] == ""
            if opened["record"]["point"] == point(8):
                bring(replica.image)
            replica.assert_at(opened["record"]["point"]["epoch"])
            keeper.send(begin(2), write(0, old), commit(3, 7))
            assert keeper.end().code == 0
        replica.image[:] = old
        replica.assert_at(7)


@pytest.mark.parametrize(
    ("place", "old"),
    [
        ("stage-created", True),
        ("part-flushed", True),
        ("part-noted", True),
        ("serve-flushed", True),
        ("stage-listed", True),
        ("stage-sealed", False),
        ("apply-recorded", False),
        ("apply-copied", False),
        ("apply-done", False),
    ],
)
def test_a_death_on_the_way(replica: Replica, place: str, old: bool) -> None:
    """Before the seal it stays at the old point, from there on it comes to the new one."""
    with replica.keeper(crash=place) as keeper:
        keeper.send(*increment(replica.target), APPLY)
        end = keeper.ended()
    assert end.code == -signal.SIGKILL
    assert made.FAILED not in [kind for kind, _, _ in end.said]
    with replica.keeper() as keeper:
        keeper.send(open_(replica.target))
        opened = json.loads(keeper.answer(1))
        assert keeper.end().code == 0
    if not old:
        bring(replica.image)
    assert opened["record"]["point"] == point(7 if old else 8)
    assert bool(opened["stage"]) == old, "what was durable waits to be gone on with"
    replica.assert_at(7 if old else 8)


def test_whatever_is_said(replica: Replica, seed: int) -> None:
    """Valid messages in any order, damaged and made up ones: anything but BEGIN and COMMIT."""
    rng = random.Random(seed)
    known = [
        *increment(replica.target),
        APPLY,
        ask(made.ROOM, 6),
        compare(7, [(0, UNIT)], [bytes(UNIT)], 4096),
        zero((0, SIZE)),
        write(SIZE - 1, b"xy"),
        made.message(made.PING),
        open_(replica.target, writable=False),
    ]
    print(f"BLKTRACK_SEED={seed}")
    for _ in range(16):
        said = [open_(replica.target)] if rng.random() < 0.8 else []
        for _ in range(rng.randrange(1, 12)):
            one = rng.choice(known)
            said.append(mutate(one, rng) if rng.random() < 0.25 else one)
        with replica.keeper() as keeper:
            keeper.send(*said)
            end = keeper.end()
        end.assert_clean()
        failed = [data for kind, _, data in end.said if kind == made.FAILED]
        assert len(failed) == end.code <= 1, end
        record = replica.record
        assert record is not None and record["state"] == "ready"
        if record["point"]["epoch"] == 8:  # all that was needed was said
            replica.image[:] = replica.content
            with replica.keeper() as keeper:
                keeper.send(open_(replica.target), commit(2, 7))
                assert keeper.end().code == 0
        replica.assert_at(7)


def test_nothing_else_is_said_on_the_wire(untouched: Replica) -> None:
    """What the keeper's tools print, and its errors, go elsewhere."""
    with untouched.keeper() as keeper:
        keeper.send(open_(untouched.target))
        keeper.answer(1)
        links = [os.readlink(f"/proc/{keeper.process.pid}/fd/{number}") for number in (1, 2)]
        assert links[0] == links[1]
        assert keeper.end().code == 0


def test_the_key_is_of_the_connection(untouched: Replica) -> None:
    """Digests by one key say nothing about those by another."""
    other = bytes(32)
    assert other != KEY
    data = bytes(untouched.image[:UNIT])
    with untouched.keeper() as keeper:
        keeper.send(open_(untouched.target, key=other.hex()), compare(2, [(0, UNIT)], [data], UNIT))
        assert keeper.answer(2) not in (b"", b"\0\0\0\0" + digest(data))
        assert keeper.end().code == 0


def test_what_nobody_thought_of_is_told_too() -> None:
    told = _told(ValueError("a number"))
    assert (told["message"], told["exit"]) == ("it failed: a number", 1)
    assert told["kinds"] == ["BlktrackError"]
