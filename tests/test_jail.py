"""Attempts to get out of `recv --restrict DIR`: each refused, and nothing touched."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blktrack.durable import write_bytes
from blktrack.errors import BlktrackError, Refused
from blktrack.ship.address import Address
from blktrack.ship.endpoint import EndError, FileEnd
from blktrack.ship.jail import Jail
from blktrack.ship.remote.connect import Link
from blktrack.ship.remote.wire import Wire
from blktrack.ship.wire import digests
from blktrack.ship.wire.message import Kind
from blktrack.units import MIB
from tests.farside import KEEPER, pipe
from tests.jails import FILL, SIZE, Grounds, full, increment
from tests.loopdev import Disks


@pytest.fixture
def grounds(tmp_path: Path) -> Grounds:
    return Grounds(tmp_path / "top")


def link(place: str, to: str) -> Callable[[Grounds], None]:
    def make(grounds: Grounds) -> None:
        (grounds.folder / place).symlink_to(to.replace("OUT", str(grounds.outside)))

    return make


def with_state(link_in: str) -> Callable[[Grounds], None]:
    """A folder of state with a link in it, where the store would create or read a file."""

    def make(grounds: Grounds) -> None:
        state = grounds.folder / "x.img.blktrack"
        state.mkdir()
        (state / link_in).symlink_to(grounds.outside / "file")

    return make


def nothing(grounds: Grounds) -> None: ...


def fifo(grounds: Grounds) -> None:
    os.mkfifo(grounds.folder / "x.img")


def socket(grounds: Grounds) -> None:
    os.mknod(grounds.folder / "x.img", 0o140600)


def another_name(grounds: Grounds) -> None:
    os.link(grounds.outside / "file", grounds.folder / "x.img")


def state_a_file(grounds: Grounds) -> None:
    (grounds.folder / "x.img.blktrack").write_bytes(b"")


def state_for_all(grounds: Grounds) -> None:
    (grounds.folder / "x.img.blktrack").mkdir()
    (grounds.folder / "x.img.blktrack").chmod(0o777)


def sub_for_all(grounds: Grounds) -> None:
    (grounds.folder / "sub").chmod(0o1777)


def a_file(grounds: Grounds) -> None:
    (grounds.folder / "file").write_bytes(b"")


def circle(grounds: Grounds) -> None:
    (grounds.folder / "x.img").symlink_to("y.img")
    (grounds.folder / "y.img").symlink_to("x.img")


# What is in the way first, the name that is asked for, and a word of the refusal.
ATTEMPTS = {
    "up": (nothing, "../x.img", "is neither in"),
    "up from below": (nothing, "sub/../../x.img", "is neither in"),
    "up within a name in full": (nothing, "DIR/../x.img", "is neither in"),
    "up through a folder that is not there": (nothing, "no/../../x.img", "is neither in"),
    "a file elsewhere": (nothing, "OUT/file", "is neither in"),
    "a new file elsewhere": (nothing, "OUT/x.img", "is neither in"),
    "the root": (nothing, "/", "is neither in"),
    "a folder of nearly the same name": (nothing, "DIR2/x.img", "is neither in"),
    "a device": (nothing, "/dev/null", "is neither in"),
    "the folder itself": (nothing, "DIR", "is a directory"),
    "the folder as a dot": (nothing, ".", "is a directory"),
    "a folder": (nothing, "sub", "is a directory"),
    "a link to a file": (link("x.img", "OUT/file"), "x.img", "is neither in"),
    "a link that dangles": (link("x.img", "OUT/new"), "x.img", "is neither in"),
    "a relative link": (link("x.img", "../../outside/file"), "x.img", "is neither in"),
    "a link in the middle": (link("sub/far", "OUT"), "sub/far/x.img", "is neither in"),
    "a link to a link": (link("sub/far", "OUT/empty"), "sub/far/../file", "is neither in"),
    "a link to the folder above": (link("up", ".."), "up/x.img", "is neither in"),
    "links in a circle": (circle, "x.img", "is neither a file nor a device"),
    "a pipe": (fifo, "x.img", "is neither a file nor a device"),
    "a socket": (socket, "x.img", "is neither a file nor a device"),
    "a file with a name elsewhere": (another_name, "x.img", "of 2 names"),
    "state in a link": (link("x.img.blktrack", "OUT/empty"), "x.img", "is not a folder in"),
    "state in a link that dangles": (link("x.img.blktrack", "OUT/no"), "x.img", "not a folder in"),
    "state in a file": (state_a_file, "x.img", "is not a folder in"),
    "state that all may write": (state_for_all, "x.img", "everybody on this host may write in"),
    "a record that is a link": (with_state("replica.json"), "x.img", "has a link in it"),
    "a record being made": (with_state(".replica.json.new"), "x.img", "has a link in it"),
    "a stage that is a link": (with_state("incoming.pack"), "x.img", "has a link in it"),
    "the state of another": (nothing, "y.img.blktrack/replica.json", "within the state"),
    "a name of a state": (nothing, "y.img.blktrack", "within the state"),
    "a key": (nothing, ".ssh/authorized_keys", "is hidden"),
    "a profile": (nothing, "sub/.profile", "is hidden"),
    "a folder that all may write": (sub_for_all, "sub/x.img", "everybody on this host"),
    "below a file": (a_file, "file/x.img", "Not a directory"),
    "too long": (nothing, "x" * 300, "File name too long"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nobody_gets_out(grounds: Grounds, attempt: str) -> None:
    prepare, asked, why = ATTEMPTS[attempt]
    prepare(grounds)
    name = asked.replace("DIR", str(grounds.folder)).replace("OUT", str(grounds.outside))
    before = grounds.seen()
    with pytest.raises(Refused, match=why) as caught:
        Jail(grounds.folder).admit(name)
    assert caught.value.hint
    done = grounds.asked(f"blktrack recv {shlex.quote(name)} --force", full(), "--allow-force")
    assert (done.code, done.out) == (1, ""), done.err
    assert why in done.err and "\n  -> " in done.err and "Traceback" not in done.err
    assert grounds.seen() == before


@pytest.mark.needs("root", "loop")
def test_no_device_that_is_not_listed(grounds: Grounds, disks: Disks) -> None:
    device = disks.loop(SIZE)
    here = grounds.folder / "node"
    os.mknod(here, 0o060600, device.stat().st_rdev)
    (grounds.folder / "link").symlink_to(device)
    before = grounds.seen()
    for name in (str(device), "node", "link"):
        done = grounds.asked(f"blktrack recv {name} --force", full(), "--allow-force", "--device",
                             "/dev/nowhere")  # fmt: skip
        assert done.code == 1 and " device that " in done.err and "\n  -> " in done.err
    assert device.read_bytes() == bytes(SIZE)
    assert grounds.seen() == before


@pytest.mark.needs("root", "loop")
def test_a_device_that_is_listed_by_any_name(grounds: Grounds, disks: Disks) -> None:
    device = disks.loop(SIZE)
    alias = disks.folder / "alias"
    alias.symlink_to(device)
    listed = ("--device", "/dev/nowhere", "--device", str(alias))
    done = grounds.asked(f"blktrack recv {device} --json", full(), *listed, "--max-size", "4K")
    assert done.code == 0, done.err
    assert done.json["target"] == str(device)
    assert device.read_bytes() == FILL + bytes(SIZE - len(FILL))
    other = disks.loop(SIZE)
    done = grounds.asked(f"blktrack recv {other}", full(), *listed)
    assert done.code == 1 and "nor a device that may be written" in done.err


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("x.img", "x.img"),
        ("DIR/x.img", "x.img"),
        ("./sub/../x.img", "x.img"),
        ("sub/a b.img", "sub/a b.img"),
        ("way/x.img", "sub/x.img"),
        ("current", "sub/x.img"),
        ("LINK/x.img", "x.img"),
    ],
)
def test_what_lies_inside_is_admitted(grounds: Grounds, asked: str, found: str) -> None:
    (grounds.folder / "way").symlink_to("sub")
    (grounds.folder / "current").symlink_to(grounds.folder / "sub/x.img")
    (grounds.top / "replicas").symlink_to("srv/replicas")
    name = asked.replace("DIR", str(grounds.folder)).replace("LINK", str(grounds.top / "replicas"))
    for folder in (grounds.folder, grounds.top / "replicas"):
        assert Jail(folder).admit(name) == str(grounds.folder / found)
    done = grounds.asked(f"blktrack recv '{name}' --quiet", full())
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (grounds.folder / found).read_bytes() == FILL + bytes(SIZE - len(FILL))
    # What it left beside the replica admits it again, from anywhere else a copy of that does too.
    shutil.copytree(grounds.folder / f"{found}.blktrack", grounds.folder / "kept")
    shutil.rmtree(grounds.folder / f"{found}.blktrack")
    (grounds.folder / f"{found}.blktrack").symlink_to(grounds.folder / "kept")
    assert grounds.asked(f"blktrack recv '{name}'", full()).code == 0
    assert Jail(grounds.folder).admit(name) == str(grounds.folder / found)


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "a\x1b[2J", "a\udc80", "a\u202eb"])
def test_a_name_has_to_print(grounds: Grounds, name: str) -> None:
    with pytest.raises(Refused, match="is no name of a replica"):
        Jail(grounds.folder).admit(name)


def test_the_folder_has_to_be_ours(grounds: Grounds) -> None:
    before = grounds.seen()
    with pytest.raises(Refused, match="which is not a folder"):
        Jail(grounds.outside / "file")
    for mode in (0o777, 0o1777):
        grounds.folder.chmod(mode)
        done = grounds.asked("blktrack recv x.img", full())
        assert done.code == 1 and "everybody on this host may write in" in done.err
    grounds.folder.chmod(0o755)
    assert grounds.seen() == before


@pytest.mark.needs("root")
def test_the_folder_is_no_home(grounds: Grounds) -> None:
    """Where a replica could be ~/.ssh/authorized_keys."""
    home = Path(pwd.getpwuid(0).pw_dir)
    (grounds.folder / "way").symlink_to(home)
    for folder in (home, home.parent, grounds.folder / "way"):
        with pytest.raises(Refused, match="the home of the user that receives"):
            Jail(folder)


def test_force_has_to_be_granted(grounds: Grounds) -> None:
    (grounds.folder / "x.img").write_bytes(b"somebody's")
    before = grounds.seen()
    for words in (("--force",), ("--force", "--json")):
        done = grounds.asked(f"blktrack recv x.img {' '.join(words)}", full())
        assert done.code == 1 and "--force is not granted" in done.err
    done = grounds.asked("blktrack recv x.img", full(), "--allow-force")
    assert done.code == 1 and "is a file with data in it" in done.err
    assert grounds.seen() == before
    assert grounds.asked("blktrack recv x.img --force", full(), "--allow-force").code == 0
    Jail(grounds.folder).check_force(asked=False)


def test_a_file_that_would_be_too_large(grounds: Grounds) -> None:
    before = grounds.seen()
    done = grounds.asked("blktrack recv x.img", full(), "--max-size", "1048575")
    assert done.code == 1
    assert "x.img may be no larger than 1 MiB, and its source is 1 MiB (1048576 b" in done.err
    assert grounds.seen() == before
    assert grounds.asked("blktrack recv x.img", full(), "--max-size", "1M").code == 0
    done = grounds.asked("blktrack recv x.img", full(2 * SIZE), "--max-size", "1M")
    assert done.code == 1 and "may be no larger" in done.err
    assert (grounds.folder / "x.img").stat().st_size == SIZE


def test_an_increment_that_would_take_too_much(grounds: Grounds) -> None:
    """Data is bounded, and so are extents without any: their list is staged, and kept in memory."""
    assert grounds.asked("blktrack recv x.img", full()).code == 0
    before = (grounds.folder / "x.img").read_bytes()
    data = increment(data=((at, 4096) for at in range(0, SIZE, 4096)))
    zero = increment(zero=((at % SIZE, 512) for at in range(0, 50 * MIB, 512)))
    for delta in (data, zero):
        done = grounds.asked("blktrack recv x.img", delta, "--max-staging", "1M")
        assert done.code == 1 and "larger than the 1 MiB that it may be" in done.err
        assert (grounds.folder / "x.img").read_bytes() == before
        assert os.listdir(grounds.folder / "x.img.blktrack") == ["replica.json"]
    assert grounds.asked("blktrack recv x.img", data, "--max-staging", "1100K").code == 0


def test_a_link_that_comes_between_is_not_followed(grounds: Grounds) -> None:
    """Somebody on this host is faster than the look at what is there."""
    before = grounds.seen()
    for name in ("file", "new"):
        late = grounds.outside / "late"
        late.symlink_to(grounds.outside / name)
        with pytest.raises(EndError):
            FileEnd(str(late), writable=True)
        late.unlink()
    state = grounds.folder / "sub"
    (state / ".replica.json.new").symlink_to(grounds.outside / "file")
    with pytest.raises(BlktrackError, match="cannot write"):
        write_bytes(state / "replica.json", b"ours")
    found = grounds.seen()
    assert all(found[path] == was for path, was in before.items() if "outside/" in path)


class Asked:
    """A keeper in the jail, asked over the wire whatever a client may think of."""

    def __init__(self, grounds: Grounds, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
        words = (*KEEPER, "--restrict", str(grounds.folder), *options)
        monkeypatch.setenv("BLKTRACK_SSH", pipe(grounds.top.parent, words))
        self.address = Address.parse(f"ssh://far{grounds.folder}/x.img")

    def link(self) -> Link:
        return Link(self.address, Wire(), threading.Event())

    def open(self, link: Link, target: str, size: int = SIZE, **other: object) -> None:
        source = {"device": "/dev/vdb", "name": "", "size": size, "host": "h"}
        wanted = {"target": target, "source": source, "force": False, "writable": True}
        near = {"key": "00" * digests.KEY_SIZE, "boot": "", "major": 0, "minor": 0}
        link.client.request(Kind.OPEN, wanted | near | other)


BY_WIRE = ["up", "a file elsewhere", "a link to a file", "a link that dangles", "state in a link"]


@pytest.mark.parametrize("attempt", BY_WIRE)
@pytest.mark.parametrize("writable", [True, False], ids=["written", "read"])
def test_nobody_gets_out_by_the_wire(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch, attempt: str, writable: bool
) -> None:
    """A replica that is only compared tells what is in it, bit by bit: it has to lie inside too."""
    prepare, asked, why = ATTEMPTS[attempt]
    prepare(grounds)
    name = asked.replace("DIR", str(grounds.folder)).replace("OUT", str(grounds.outside))
    keeper = Asked(grounds, monkeypatch, "--allow-force")
    before = grounds.seen()
    with keeper.link() as link, pytest.raises(Refused, match=why) as caught:
        keeper.open(link, name, force=True, writable=writable)
    assert caught.value.hint
    assert grounds.seen() == before


def test_the_wire_keeps_to_the_limits(grounds: Grounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the source is said to have grown since."""
    keeper = Asked(grounds, monkeypatch, "--max-size", "1M")
    before = grounds.seen()
    with keeper.link() as link, pytest.raises(Refused, match="may be no larger"):
        keeper.open(link, "x.img", SIZE + 1)
    with keeper.link() as link, pytest.raises(Refused, match="--force is not granted"):
        keeper.open(link, "x.img", force=True)
    assert grounds.seen() == before
    with keeper.link() as link:
        keeper.open(link, "x.img")
        with pytest.raises(Refused, match="may be no larger"):
            link.client.request(
                Kind.BEGIN, {"size": 1 << 40, "state": "unfinished", "generation": "g"}
            )
    assert grounds.seen().keys() == before.keys()
