"""Hooks around the freeze of a sync, and its cap, as an operator gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blktrack import capture, sync
from blktrack.capture import Source
from blktrack.errors import NoPoint
from blktrack.extent import ExtentArray
from blktrack.options import Options
from blktrack.tracker.tracking import Swap
from blktrack.units import MIB
from tests.background import assert_clear
from tests.blockdev import Lab, Silent, read_image, run

pytestmark = pytest.mark.needs("root", "loop", "bpf", "ext4")

FILESYSTEM = ("--consistency", "filesystem")


class Pair:
    """A tracked source with an ext4 on it, and a replica in step with it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.device, self.replica, self.log = lab.loop(64 * MIB), lab.name("replica"), lab.name("l")
        run("mkfs.ext4", "-q", self.device)
        lab.track(self.device)
        lab.sync(self.device, self.replica)

    def say(self, word: str) -> str:
        """A hook that adds a word to the log."""
        return f"echo {word} $BLKTRACK_PHASE $BLKTRACK_DEVICE >> {self.log}"

    @property
    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def pair(shared: Lab) -> Pair:
    return Pair(shared)


def test_hooks_of_the_command_line(pair: Pair) -> None:
    hooks = ["--pre-freeze", pair.say("1"), "--pre-freeze", pair.say("2")]
    hooks += ["--post-freeze", pair.say("3"), "--post-freeze", pair.say("4")]
    words = ["sync", pair.device, str(pair.replica), "--json", *FILESYSTEM, *hooks]
    device = pair.device
    expected = [f"1 pre {device}", f"2 pre {device}", f"3 post {device}", f"4 post {device}"]
    with pair.lab.mounted(pair.device):
        done = pair.lab.blktrack(*words)
        assert done.json["consistency"] == "filesystem"
        assert done.json["freeze_s"] > 0
        assert done.err == ""
    assert pair.said == expected
    # Where nothing is mounted they may hold still what writes to the device itself.
    done = pair.lab.blktrack(*words)
    assert (done.json["consistency"], done.json["freeze_s"]) == ("crash", 0)
    assert pair.said == 2 * expected


def test_no_freeze_no_hooks(pair: Pair) -> None:
    hooks = ["--pre-freeze", pair.say("1"), "--post-freeze", pair.say("2")]
    with pair.lab.mounted(pair.device):
        done = pair.lab.blktrack("sync", pair.device, pair.replica, "--json", *hooks)
    assert done.json["consistency"] == "crash"
    assert pair.said == []


def test_hooks_of_a_crash_point_that_needs_a_freeze(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, said = Source.is_valid, Silent()
    raced = iter([True])

    def is_valid(source: Source, swap: Swap, extents: ExtentArray) -> bool:
        return not next(raced, False) and real(source, swap, extents)

    monkeypatch.setattr(Source, "is_valid", is_valid)
    monkeypatch.setattr(capture, "_MOST", 1)
    options = Options(pre=(pair.say("1"),), post=("echo no >&2; false",))
    with pair.lab.mounted(pair.device) as point:
        (point / "file").write_text("x")
        run("sync", "--file-system", point)
        report = sync.sync(pair.lab.store, pair.device, str(pair.replica), options, said)[0]
    assert (report.consistency, report.rounds) == ("filesystem", 2)
    assert pair.said == [f"1 pre {pair.device}"]
    assert said.warnings == ["the post hook 'echo no >&2; false' failed: it ended with code 1: no"]


def test_a_post_hook_that_fails_is_told_of(pair: Pair) -> None:
    """By --quiet too: what it was to release may still be held."""
    hooks = ["--post-freeze", "echo locked >&2; exit 3", "--post-freeze", pair.say("last")]
    done = pair.lab.blktrack("sync", pair.device, pair.replica, "--quiet", *FILESYSTEM, *hooks)
    assert (done.code, done.out) == (0, "")
    assert done.err == (
        "blktrack: warning: the post hook 'echo locked >&2; exit 3' failed: "
        "it ended with code 3: locked\n"
    )
    assert pair.said == [f"last post {pair.device}"]
    link = pair.lab.status(pair.device)["links"][0]
    assert (link["state"], link["consistency"]) == ("ready", "crash")


def test_a_pre_hook_that_fails(pair: Pair) -> None:
    """There is no point, and what the post hooks say is told all the same."""
    before = read_image(pair.replica)
    hooks = ["--pre-freeze", "echo busy >&2; exit 7", "--pre-freeze", pair.say("never")]
    hooks += ["--post-freeze", pair.say("post"), "--post-freeze", "exit 5"]
    with pair.lab.mounted(pair.device) as point:
        (point / "file").write_text("x")
        done = pair.lab.blktrack("sync", pair.device, pair.replica, *FILESYSTEM, *hooks)
    warning, _, rest = done.err.partition("\n")
    assert warning == "blktrack: warning: the post hook 'exit 5' failed: it ended with code 5"
    assert_clear(type(done)(done.code, done.out, rest), 4, "ended with code 7: busy")
    assert pair.said == [f"post post {pair.device}"]
    assert (read_image(pair.replica) == before).all()
    assert not Path(f"{pair.replica}.blktrack/incoming.pack").exists()


def test_the_cap_of_the_command_line(pair: Pair) -> None:
    """What the hook writes is all read under the freeze: 4 MiB at 2 MiB a second."""
    with pair.lab.mounted(pair.device) as point:
        fill = f"dd if=/dev/urandom of={point}/file bs=1M count=4 conv=fsync"
        words = ["sync", pair.device, str(pair.replica), *FILESYSTEM, "--pre-freeze", fill]
        done = pair.lab.blktrack(*words, "--limit", "2M", "--freeze-cap", "0.2")
        assert_clear(done, 4, "longer than the 0.2 s allowed")
        done = pair.lab.blktrack(*words, "--limit", "2M", "--freeze-cap", "60", "--json")
        assert done.json["consistency"] == "filesystem"
        assert done.json["freeze_s"] > 0.2
    run("e2fsck", "-f", "-n", pair.replica)


def test_how_long_a_round_may_be_follows_the_cap(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A freeze that could only expire is not begun, and neither is its hook."""
    monkeypatch.setattr(Source, "is_valid", lambda *_: False)
    monkeypatch.setattr(capture, "_MOST", 1)
    options = Options(pre=(pair.say("1"),), cap=1e-6)
    with pair.lab.mounted(pair.device) as point:
        (point / "file").write_text("x")
        run("sync", "--file-system", point)
        with pytest.raises(NoPoint, match="faster than it can be read"):
            sync.sync(pair.lab.store, pair.device, str(pair.replica), options, Silent())
    assert pair.said == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *((["--freeze-cap", bad], "at most 60") for bad in ("0", "-1", "60.1", "nan", "inf", "x")),
        (["--no-freeze", *FILESYSTEM], "forbids"),
        (["--no-freeze", "--pre-freeze", "true"], "no hook would run"),
        (["--consistency", "none", "--post-freeze", "true"], "no hook would run"),
    ],
)
def test_wrong_usage(lab: Lab, words: list[str], says: str) -> None:
    done = lab.blktrack("sync", "/dev/null", lab.name("replica"), *words)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
