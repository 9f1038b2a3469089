"""What a key takes whose command is `blktrack recv --restrict DIR`: two commands, and no shell."""

from __future__ import annotations

import os
import pty
from pathlib import Path

import pytest

from blktrack.cli import main, recv
from blktrack.cli.forced import VARIABLE, Wanted, parse
from blktrack.errors import UsageError
from blktrack.ship.jail import Jail
from blktrack.units import GIB
from tests.jails import Grounds, full


@pytest.fixture
def grounds(tmp_path: Path) -> Grounds:
    return Grounds(tmp_path / "top")


REFUSED = [
    "sh",
    "/bin/sh -c id",
    "scp -t /srv/replicas/x.img",
    "/usr/lib/openssh/sftp-server",
    "internal-sftp",
    "rsync --server . x.img",
    "blktrack",
    "blktrack recv",
    "blktrack status",
    "blktrack send /dev/vda --link x",
    "blktrack sync /dev/vda x.img",
    "blktrack --version",
    "recv --serve",
    "notblktrack recv --serve",
    "blktrack/ recv --serve",
    "sudo blktrack recv --serve",
    "BLKTRACK_ROOT=/tmp blktrack recv --serve",
    "blktrack receive --serve",
    # More than what was asked for.
    "blktrack recv --serve x.img",
    "blktrack recv --serve --json",
    "blktrack recv --serve --restrict /",
    "blktrack recv x.img --serve",
    "blktrack recv x.img y.img",
    "blktrack recv x.img --restrict /",
    "blktrack recv x.img --restrict=/",
    "blktrack recv x.img --device /dev/vda",
    "blktrack recv x.img --allow-force",
    "blktrack recv x.img --max-size 1G",
    "blktrack recv x.img --forc",
    "blktrack recv x.img --json=1",
    "blktrack recv x.img -h",
    "blktrack recv -- x.img",
    "blktrack recv -x",
    "blktrack recv ''",
    "blktrack recv --json",
    # What a shell would act on.
    "blktrack recv --serve; rm -rf /",
    "blktrack recv --serve;touch PWNED",
    "blktrack recv --serve\ntouch PWNED",
    "blktrack recv --serve\rtouch PWNED",
    "blktrack recv --serve && touch PWNED",
    "blktrack recv --serve | tee PWNED",
    "blktrack recv --serve > PWNED",
    "blktrack recv x.img < /etc/shadow",
    "blktrack recv $(touch PWNED)",
    "blktrack recv `touch PWNED`",
    "blktrack recv '$(touch PWNED)'",
    "blktrack recv $HOME/x.img",
    "blktrack recv ~/x.img",
    "blktrack recv *.img",
    "blktrack recv x.{a,b}",
    "blktrack recv x[ab].img",
    "blktrack recv x\\ y.img",
    "blktrack recv x.img # a comment",
    "blktrack recv x.img !!",
    "blktrack recv 'x.img",
    'blktrack recv "x.img',
    "blktrack recv x\x1b[2Jy.img",
    "blktrack recv x\udcffy.img",
    "blktrack recv --serve" + " " * 10000,
    "blktrack recv " + "x/" * 5000,
]


@pytest.mark.parametrize("command", REFUSED)
def test_anything_else_is_refused(
    command: str,
    grounds: Grounds,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without a look at what is there, and without a character that a terminal would act on."""
    monkeypatch.chdir(grounds.folder)
    monkeypatch.setitem(os.environ, VARIABLE, command)
    monkeypatch.setattr(recv, "_serve", lambda _: pytest.fail("it was served"))
    monkeypatch.setattr(recv, "_receive", lambda *_: pytest.fail("it was received"))
    before = grounds.seen()
    assert main(["recv", "--restrict", str(grounds.folder)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    sentence, hint = err.splitlines()
    assert sentence.startswith("blktrack: this key is for replicas alone, and ")
    assert hint.startswith("  -> ")
    assert all(line.isprintable() and len(line) < 250 for line in (sentence, hint))
    assert grounds.seen() == before


def test_a_real_one_of_them(grounds: Grounds) -> None:
    before = grounds.seen()
    done = grounds.asked("blktrack recv --serve; rm -rf /", full())
    assert (done.code, done.out) == (2, "") and "'blktrack recv --serve; rm -rf /'" in done.err
    assert grounds.seen() == before


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("", Wanted()),
        ("  ", Wanted()),
        ("blktrack recv --serve", Wanted()),
        ("/opt/blktrack/.venv/bin/blktrack  recv  --serve", Wanted()),
        ("'/opt/my tools/blktrack' recv --serve", Wanted()),
        ("blktrack recv /srv/x.img", Wanted("/srv/x.img")),
        ("blktrack recv 'a b.img' --json", Wanted("a b.img", json=True)),
        ('blktrack recv --force --quiet "à côté.img"', Wanted("à côté.img", True, False, True)),
        ("blktrack recv ../x.img", Wanted("../x.img")),  # for the jail to refuse
    ],
)
def test_what_is_understood(command: str, wanted: Wanted) -> None:
    assert parse(command) == wanted


def test_a_refusal_is_short() -> None:
    with pytest.raises(UsageError, match=r"x\.\.\.' was asked for") as caught:
        parse("x" * 100000)
    assert len(str(caught.value)) < 200


def test_what_the_key_says_comes_first(grounds: Grounds) -> None:
    """A target in the command of the key is the one that is meant, whatever the client wants."""
    target = grounds.folder / "x.img"
    done = grounds.asked("blktrack recv y.img", full(), str(target), "--json")
    assert done.code == 0 and done.json["target"] == str(target)
    outside = grounds.outside / "x.img"
    done = grounds.asked(None, full(), str(outside))
    assert done.code == 1 and "is neither in" in done.err


@pytest.mark.parametrize("command", [None, "", "blktrack recv --serve"])
def test_a_sync_is_served(
    command: str | None, grounds: Grounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Jail | None] = []

    def serve(jail: Jail | None) -> int:
        served.append(jail)
        return 0

    monkeypatch.setattr(recv, "_serve", serve)
    monkeypatch.delitem(os.environ, VARIABLE, raising=False)
    if command is not None:
        monkeypatch.setitem(os.environ, VARIABLE, command)
    limits = ["--device", "/dev/a", "--device", "/dev/b", "--max-size", "1T", "--max-staging", "1G"]
    with open(os.devnull, encoding="ascii") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert main(["recv", "--restrict", str(grounds.folder), *limits]) == 0
        assert main(["recv", "--restrict", str(grounds.folder), "--serve", "--allow-force"]) == 0
        assert main(["recv", "--serve"]) == 0
    first, second, third = served
    assert first is not None and second is not None and third is None
    assert (first.folder, first.devices) == (grounds.folder, ("/dev/a", "/dev/b"))
    assert (first.most_size, first.most_staging, first.force) == (1024 * GIB, GIB, False)
    assert (second.most_size, second.most_staging, second.force) == (None, None, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "TARGET is missing"),
        (("x", "--device", "/dev/a"), "--device goes with --restrict"),
        (("x", "--max-size", "1G"), "--max-size goes with --restrict"),
        (("x", "--max-staging", "1G"), "--max-staging goes with --restrict"),
        (("--serve", "--allow-force"), "--allow-force goes with --restrict"),
        (("--serve", "x"), "--serve goes with neither TARGET nor --force"),
        (("--serve", "--force"), "--serve goes with neither TARGET nor --force"),
    ],
)
def test_wrong_words(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recv", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_terminal_is_no_wire(
    grounds: Grounds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, encoding="ascii") as stdin, open(ours, "rb"):
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["recv", "--restrict", str(grounds.folder)]) == 2
    assert "a sync is expected on standard input" in capsys.readouterr().err
