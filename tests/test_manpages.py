"""Man pages as the formatters and the index of man read them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blktrack.cli import COMMANDS, parsers
from tools import manpages

ROOT = Path(__file__).resolve().parent.parent
TOP = parsers()
NAMES = ["blktrack", *(f"blktrack-{command}" for command in COMMANDS)]
WHEN = "1767225600"  # 2026-01-01
SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS"]
SECTIONS += ["FILES", "ENVIRONMENT", "SEE ALSO"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man") / "new"
    write(folder)
    return folder


def write(folder: Path, **env: str) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "tools/manpages.py"), str(folder)],
        check=True,
        cwd="/",
        env={**os.environ, "SOURCE_DATE_EPOCH": WHEN, **env},
    )


def shown(page: Path) -> str:
    """As a reader sees it, on one line where it was filled."""
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(page)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MANWIDTH": "400", "MANROFFOPT": "-c", "LC_ALL": "C.UTF-8"},
    )
    assert done.stderr == ""
    return done.stdout


def test_a_page_for_each_command(pages: Path) -> None:
    assert {path.name for path in pages.iterdir()} == {f"{name}.8" for name in NAMES}


@pytest.mark.needs("man")
@pytest.mark.parametrize("name", NAMES)
def test_man_shows_all_of_it(pages: Path, name: str) -> None:
    text = shown(pages / f"{name}.8")
    headings = re.findall(r"^([A-Z][A-Z ]+)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    command = name.partition("-")[2]
    parser = TOP.subparsers[command] if command else TOP
    flat = " ".join(text.split())
    for one in parser.walk() if command else [parser]:
        for action in one.arguments:
            for option in action.option_strings:
                assert re.search(rf"^ +(-\w, )?{option}\b", text, re.MULTILINE), option
            assert " ".join(one.help_of(action).split()) in flat
        for paragraph in one.text.prose if command else ():
            assert paragraph in flat
        for example in one.text.examples:
            for line in example.splitlines():
                assert line in text
    assert "2026-01-01" in text


@pytest.mark.needs("man")
@pytest.mark.parametrize("name", NAMES)
def test_the_index_finds_it(pages: Path, name: str) -> None:
    done = subprocess.run(
        ["lexgrog", str(pages / f"{name}.8")], capture_output=True, text=True, check=True
    )
    summary = COMMANDS.get(name.partition("-")[2], "replicate")
    assert f'"{name} - {summary}' in done.stdout


@pytest.mark.needs("man")
@pytest.mark.parametrize("name", NAMES)
def test_groff_has_nothing_to_say(pages: Path, name: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-Kutf8", str(pages / f"{name}.8")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.needs("mandoc")
@pytest.mark.parametrize("name", NAMES)
def test_mandoc_has_nothing_to_say(pages: Path, name: str) -> None:
    done = subprocess.run(
        ["mandoc", "-Tlint", str(pages / f"{name}.8")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_a_build_can_be_repeated(pages: Path, tmp_path: Path) -> None:
    write(tmp_path, COLUMNS="40", BLKTRACK_ROOT=str(tmp_path), TZ="Asia/Tokyo")
    for name in NAMES:
        again = (tmp_path / f"{name}.8").read_bytes()
        assert again == (pages / f"{name}.8").read_bytes()


@pytest.mark.needs("man")
@pytest.mark.parametrize(
    "text",
    [
        ".SH is no request here",
        "'tis neither",
        r"a \ b \fB \n",
        "say \"yes\" and 'no' and `pwd` ^ ~",
        "--option of a-word, /a-b/c-d (--x)",
        "dots … and × are meant",
    ],
)
def test_nothing_in_a_text_is_taken_for_roff(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.8"
    lines = [".SH NAME", r"page \- test", ".SH TEXT", *manpages._filled(text), ".EX"]
    page.write_text(manpages._page([*lines, manpages._exact(text), ".EE"], "page", "2026-01-01"))
    found = [line.strip() for line in shown(page).splitlines()]
    # In prose a dash between letters is a hyphen.
    assert [line.replace("\N{HYPHEN}", "-") for line in found].count(text) == 2
