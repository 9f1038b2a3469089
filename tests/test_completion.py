"""What a shell offers, asked of real shells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack.cli import COMMANDS, parsers
from blktrack.cli.parser import Parser
from tests.blockdev import wait_until
from tests.terminal import Terminal

PARSERS = list(parsers().walk())
LEAVES = [parser for parser in PARSERS if not parser.subparsers]
DISK = next((f"/dev/{name}" for name in os.listdir("/sys/block")), "")

# One line that calls the function as readline would, for words in "$@" of which the last is typed.
_ASK = r"""
. "$0"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_POINT=${#COMP_LINE}
_blktrack
printf '%s\n' "${COMPREPLY[@]}"
"""

# Each Tab tells what it would offer: compadd is where all of it passes.
_ZSHRC = r"""
PS1='ready> ' LISTMAX=0
autoload -Uz compinit && compinit -u -D
. $SCRIPT
compadd() {
    local -a offered
    if (( ! ${@[(I)-[OAD]*]} )); then
        builtin compadd -O offered "$@"
        print -rl -- $offered >>$OFFERED
    fi
    builtin compadd "$@"
}
tell() {
    zle list-choices
    print done >>$OFFERED
    BUFFER=
}
zle -N tell
bindkey '^T' tell
"""


class Bash:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "completion.bash"
        self.script.write_text(_printed("bash"), encoding="utf-8")

    def offers(self, line: str) -> list[str]:
        # In words as bash has them.
        words = line.replace("=", " = ").replace(":", " : ").split(" ")
        done = subprocess.run(
            ["bash", "--norc", "-c", _ASK, str(self.script), *filter(None, words[:-1]), words[-1]],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**os.environ, "BLKTRACK_ROOT": str(self.folder), "COMP_LINE": line},
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [found for found in done.stdout.splitlines() if found]


class Zsh:
    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, folder / "offered"
        script = folder / "completion.zsh"
        script.write_text(_printed("zsh"), encoding="utf-8")
        (folder / ".zshrc").write_text(_ZSHRC, encoding="utf-8")
        self.terminal = Terminal(
            ["zsh", "-i", "-d"],
            columns=1000,
            env={
                "ZDOTDIR": str(folder),
                "BLKTRACK_ROOT": str(folder),
                "SCRIPT": str(script),
                "OFFERED": str(self.told),
            },
        )
        self.terminal.send(f"cd {folder}\n")
        self.terminal.until("ready> ")

    def offers(self, line: str) -> list[str]:
        self.told.write_text("", encoding="utf-8")
        self.terminal.send(f"{line}\x14")

        def told() -> list[str]:
            self.terminal.read()
            return self.told.read_text(encoding="utf-8").splitlines()

        wait_until(lambda: told()[-1:] == ["done"], f"what zsh offers for {line!r}")
        return [found for found in told()[:-1] if found]


def _printed(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "blktrack", "completion", shell],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(
    scope="module",
    params=["bash", pytest.param("zsh", marks=pytest.mark.needs("zsh"))],
)
def shell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bash | Zsh]:
    folder = tmp_path_factory.mktemp("shell")
    _remember(folder, "one", "/dev/blktrack-first", "near")
    _remember(folder, "two", "/dev/blktrack-second", "far")
    (folder / "replica.img").touch()
    (folder / "backups").mkdir()
    if request.param == "bash":
        yield Bash(folder)
        return
    zsh = Zsh(folder)
    with zsh.terminal:
        yield zsh


def _remember(root: Path, number: str, path: str, link: str) -> None:
    """A tracked device, as the state has it."""
    from blktrack.config import Paths
    from blktrack.state import DeviceState, LinkState, Store

    store = Store(Paths.below(root))
    store.save_device(DeviceState(number, path, f"serial {number}"))
    target = f"ssh://me@vault:22/b/{number}.img" if number == "one" else "/nowhere"
    store.save_link(number, LinkState(f"link-{number}", link, target))


def test_the_state_has_what_the_shells_look_for(tmp_path: Path) -> None:
    """They read it by line, for want of a parser."""
    _remember(tmp_path, "one", "/dev/sdx", "near")
    (file,) = tmp_path.glob("var/lib/blktrack/devices/*/device.json")
    assert json.loads(file.read_text(encoding="utf-8"))["path"] == "/dev/sdx"
    assert ' "path": "/dev/sdx",' in file.read_text(encoding="utf-8").splitlines()


def test_commands(shell: Bash | Zsh) -> None:
    assert set(shell.offers("blktrack ")) == set(COMMANDS)
    assert set(shell.offers("blktrack help ")) == set(COMMANDS)
    assert shell.offers("blktrack untr") == ["untrack"]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_option_is_offered(shell: Bash | Zsh, parser: Parser) -> None:
    known = {name for action in parser.arguments for name in action.option_strings}
    offered = {name.rstrip("=") for name in shell.offers(f"{parser.prog} --")}
    assert offered == {name for name in known if name.startswith("--")}


@pytest.mark.parametrize(
    "parser", [parser for parser in PARSERS if parser.subparsers], ids=lambda parser: parser.prog
)
def test_every_action_is_offered(shell: Bash | Zsh, parser: Parser) -> None:
    assert set(shell.offers(f"{parser.prog} ")) == set(parser.subparsers)


@pytest.mark.parametrize("parser", LEAVES, ids=lambda parser: parser.prog)
def test_every_choice_is_offered(shell: Bash | Zsh, parser: Parser) -> None:
    places = [action for action in parser.arguments if not action.option_strings]
    for action in parser.arguments:
        if not action.choices:
            continue
        if action.option_strings:
            line = f"{parser.prog} {action.option_strings[-1]} "
        else:
            line = f"{parser.prog} " + "x " * places.index(action)
        assert set(shell.offers(line)) == {str(choice) for choice in action.choices}


def test_a_value_after_an_equals_sign(shell: Bash | Zsh) -> None:
    assert shell.offers("blktrack sync --consistency=cr") == ["crash"]


def test_tracked_devices_come_first(shell: Bash | Zsh) -> None:
    tracked = {"/dev/blktrack-first", "/dev/blktrack-second"}
    for line in ("untrack ", "sync --full ", "status ", "send --limit 5M "):
        assert set(shell.offers(f"blktrack {line}")) == tracked
    assert shell.offers("blktrack verify /dev/blktrack-s") == ["/dev/blktrack-second"]


@pytest.mark.skipif(not DISK, reason="this host has no disk")
@pytest.mark.parametrize("command", ["track", "untrack"])
def test_other_devices_where_none_that_is_tracked_is_meant(shell: Bash | Zsh, command: str) -> None:
    assert Path(DISK).is_block_device()
    for typed in (DISK, DISK[:-1]):
        offered = shell.offers(f"blktrack {command} {typed}")
        assert DISK in [Path("/dev", path).as_posix() for path in offered]
    assert "/dev/null" not in shell.offers(f"blktrack {command} /dev/nul")
    assert "null" not in shell.offers(f"blktrack {command} /dev/nul")


def test_a_target_is_a_file_too(shell: Bash | Zsh) -> None:
    assert shell.offers("blktrack recv repl") == ["replica.img"]
    offered = shell.offers("blktrack sync /dev/blktrack-first ")
    assert {"replica.img", "backups"} <= {name.rstrip("/") for name in offered}


FAR = "ssh://me@vault:22/b/one.img"


def test_a_replica_on_another_host(shell: Bash | Zsh) -> None:
    """Of it is known what links have; and what follows it is found behind its colons."""
    for line in ("sync /dev/blktrack-first ", "history /dev/blktrack-first --target "):
        offered = {name.rstrip("/") for name in shell.offers(f"blktrack {line}")}
        assert {FAR, "replica.img"} <= offered
        assert shell.offers(f"blktrack {line}ss") == [FAR]
    assert FAR not in shell.offers("blktrack recv ")
    for typed in ("ssh:", "ssh://me", "ssh://me@vault:2"):
        (found,) = shell.offers(f"blktrack verify /dev/blktrack-first {typed}")
        assert FAR.endswith(found) and typed + found.removeprefix(typed) in (FAR, typed + found)
    assert shell.offers("blktrack sync /dev/x ssh://[::1]:22/a.img --qu") == ["--quiet"]
    assert shell.offers(f"blktrack sync /dev/x {FAR} --consistency cr") == ["crash"]
    assert shell.offers("blktrack sync /dev/x ssh://nobody/") == []


def test_status_takes_a_replica(shell: Bash | Zsh) -> None:
    assert shell.offers("blktrack status ./repl") in (["./replica.img"], ["replica.img"])


def test_folders_and_links(shell: Bash | Zsh) -> None:
    offered = {name.rstrip("/") for name in shell.offers("blktrack service install --to ")}
    assert "backups" in offered and "replica.img" not in offered
    assert set(shell.offers("blktrack send /dev/blktrack-first --link ")) == {"near", "far"}


def test_nothing_where_nothing_can_be_known(shell: Bash | Zsh) -> None:
    assert shell.offers("blktrack sync --limit ") == []


def test_bash_completes_a_name_with_colons(tmp_path: Path) -> None:
    """To bash a colon parts words, and what is offered has to be the rest of the last one."""
    bash = Bash(tmp_path)
    (tmp_path / "pci-0000:00:1f.img").touch()
    assert bash.offers("blktrack sync /dev/x ./pci-0000:00") == ["00:1f.img"]
    assert bash.offers("blktrack recv ./pci-0000:00:1f.img --qu") == ["--quiet"]


def test_bash_on_a_terminal(tmp_path: Path) -> None:
    """With readline, and with nothing loaded but the script."""
    bash = Bash(tmp_path)
    (tmp_path / "a replica.img").touch()
    with Terminal(["bash", "--norc", "--noprofile", "-i"], env={"PS1": "ready> "}) as terminal:
        terminal.send(f". {bash.script}; cd {tmp_path}\n")
        terminal.send("blktrack() { printf '<%s>' \"$@\"; echo; }\n")
        terminal.send("blktrack syn\t--consistency fil\t--in\t/dev/nul ./a\tend\n")
        terminal.until(
            "<sync><--consistency><filesystem><--in-place></dev/nul><./a replica.img><end>"
        )
