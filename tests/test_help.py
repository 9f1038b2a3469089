"""What the command line says of itself, and of what was typed wrong."""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from blktrack import __version__
from blktrack.cli import COMMANDS, main, parsers
from blktrack.cli.parser import EXITS, Misused, Parser

TOP = parsers()
PARSERS = list(TOP.walk())
LEAVES = [parser for parser in PARSERS if not parser.subparsers]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits_and_is_complete(
    parser: Parser, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = parser.format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert parser.description and len(parser.text.prose[0]) > 20
    assert [
        action for action in parser.arguments if not action.help and action.nargs != argparse.PARSER
    ] == []
    if parser is not TOP:
        assert parser.text.examples, "no example"
        assert "examples:\n  " in text


@pytest.mark.parametrize("parser", LEAVES, ids=lambda parser: parser.prog)
def test_examples_are_right(parser: Parser) -> None:
    found = [words for example in parser.text.examples for words in commands_in(example)]
    assert any(f"blktrack {' '.join(words)}".startswith(parser.prog) for words in found)
    for words in found:
        args, left = TOP.parse_known_args(words)
        assert args.command and not left


def commands_in(example: str) -> Iterator[list[str]]:
    """What comes after each blktrack in lines of a shell."""
    for line in example.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for start in (at for at, word in enumerate(words) if word == "blktrack"):
            rest = words[start + 1 :]
            ends = [at for at, word in enumerate(rest) if set(word) <= set("|<>();&")]
            yield rest[: ends[0]] if ends else rest


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_exit_codes_are_those_of_the_contract(parser: Parser) -> None:
    assert {"0", "1", "2"} <= set(parser.exits) <= set(EXITS)


def test_the_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) <= 40
    for name, summary in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary[:30])}", err, re.MULTILINE)
    assert said(capsys, "--help") == (0, err, "")


def test_help_is_dash_dash_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "help") == said(capsys, "--help")
    for parser in PARSERS[1:]:
        words = parser.prog.split()[1:]
        assert said(capsys, "help", *words) == said(capsys, *words, "--help")


@pytest.mark.parametrize(
    ("line", "message", "program"),
    [
        ("snyc a b", "there is no command 'snyc'; did you mean sync?", "blktrack"),
        ("zzz", "there is no command 'zzz'", "blktrack"),
        ("help snyc", "there is no command 'snyc'; did you mean sync?", "blktrack"),
        ("--quite", "there is no option --quite", "blktrack"),
        ("--versoin", "there is no option --versoin; did you mean --version?", "blktrack"),
        ("sync /dev/a b --limt=5", "there is no option --limt; did you mean --limit?", "sync"),
        ("sync /dev/a b -x", "there is no option -x", "sync"),
        ("sync /dev/a b c d", "'c' is one argument too many", "sync"),
        ("verify /dev/a", "TARGET is missing", "verify"),
        ("verify", "DEVICE and TARGET are missing", "verify"),
        ("send /dev/a", "--link is missing", "send"),
        ("sync /dev/a b --limit", "--limit needs a value", "sync"),
        ("sync /dev/a b --limit 1Q", "--limit: '1Q' is not a size; write a number", "sync"),
        (
            "sync /dev/a b --consistency crush",
            "--consistency: 'crush' is not one of none, crash, filesystem; did you mean crash?",
            "sync",
        ),
        ("sync /dev/a b --json=1", "--json: ignored explicit argument '1'", "sync"),
        ("service", "ACTION is missing", "service"),
        ("service instal", "there is no action 'instal'; did you mean install?", "service"),
        ("service xyz", "there is no action 'xyz'; there are show, install, remove", "service"),
        ("service show --ot x", "there is no option --ot; did you mean --to?", "service show"),
    ],
)
def test_one_sentence_for_what_is_wrong(
    capsys: pytest.CaptureFixture[str], line: str, message: str, program: str
) -> None:
    code, out, err = said(capsys, *line.split())
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    where = program if program == "blktrack" else f"blktrack {program}"
    assert first.startswith(f"{where}: {message}")
    assert second == f"  -> see {where} --help"


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_an_option_that_is_nearly_right_is_named(parser: Parser) -> None:
    for action in parser.arguments:
        for name in action.option_strings:
            if name.startswith("--") and len(name) > 5:
                with pytest.raises(Misused, match=rf"no option {name[:-1]}; did you mean {name}\?"):
                    parser.refuse([name[:-1]])


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """What is unique today is not after the next release."""
    code, _, err = said(capsys, "recv", "x", "--forc")
    assert code == 2 and "there is no option --forc; did you mean --force?" in err


def test_a_command_imports_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    out = python(
        "import sys; from blktrack.cli import main\n"
        "try: main(['extents', '--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded:', *sys.modules)"
    )
    loaded = set(out.rpartition("loaded: ")[2].split())
    found = {name for name in COMMANDS if f"blktrack.cli.{name}" in loaded}
    assert found == {"extents"}
    assert loaded & {"bcc", "rich", "pyroute2", "difflib"} == set()


def test_every_parser_can_be_had_where_little_is_installed() -> None:
    out = python(
        "import sys; sys.modules.update(bcc=None, rich=None, pyroute2=None)\n"
        "from blktrack.cli import parsers; print(*parsers().subparsers)"
    )
    assert out.split() == list(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "--version")
    assert (code, err) == (0, "")
    found = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(found) == ["blktrack", "bcc", "libbpf", "python", "linux"]
    assert found["blktrack"] == __version__
    assert found["python"] == platform.python_version()
    assert found["linux"] == platform.release()


@pytest.mark.needs("bpf")
def test_version_of_bcc_is_its_own_and_does_not_load_it() -> None:
    own = python("from bcc.version import __version__; print(__version__)").strip()
    out = python(
        "import sys; from blktrack.cli.version import text\nprint(text(), 'bcc' in sys.modules)"
    )
    assert f"bcc      {own}\n" in out and out.endswith("False\n")
    libbpf = python("from blktrack.bpf.libbpf import library; print(library()._name)")
    assert libbpf and not re.search(r"libbpf +(not|unknown)", out)


def test_version_where_nothing_is_installed() -> None:
    out = python(
        "import sys; sys.modules['bcc'] = None\n"
        "from blktrack.bpf import libbpf; libbpf.SONAME = 'libnothing.so'\n"
        "from blktrack.cli.version import text; print(text())"
    )
    assert "bcc      not installed\nlibbpf   not installed\n" in out
