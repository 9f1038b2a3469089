"""What the pages name is there: commands, options, files, headings, keys, messages, exit codes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from blktrack.cli import parsers
from blktrack.cli.parser import EXITS, Misused, Parser
from blktrack.policy import load
from blktrack.policy.read import DEFAULT_KEYS, DEVICE_KEYS, REPLICA_KEYS
from tests.blockdev import TOP

PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_lines(page: str) -> Iterator[str]:
    """Lines of code: of fences, of indented blocks, with those that a backslash continues."""
    fenced, whole = False, ""
    for line in page.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            whole += line.strip()
            if whole.endswith("\\"):
                whole = whole[:-1] + " "
            else:
                yield whole
                whole = ""


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.S | re.M)


def spans(page: str) -> list[str]:
    """What stands in backquotes in the text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of each command of blktrack, up to what the shell sees to or what explains it."""
    for line in [*code_lines(page), *spans(page)]:
        if "blktrack" not in line:
            continue
        line = re.sub(r"^(# |ExecStart=|\*/5 \* \* \* \*\s+root\s+)", "", line)
        line = re.sub(r'^restrict,command="([^"]*)".*', r"\1", line)  # of authorized_keys
        line = re.sub(r"^([A-Z_]+=\S+\s+)+", "", line)
        for part in re.split(r"\s*[|;]\s*|, (?=blktrack )|ssh \w+ ", line):
            if re.match(r"(\S*/)?blktrack [a-z-]", part):
                part = re.split(r"\s{2,}(?!-)|\s[<>]|\.\.\.", part)[0].rstrip(",")
                yield words_of(part)


def words_of(command: str) -> list[str]:
    command = command.replace("[", "").replace("]", "")
    try:
        return shlex.split(command, comments=True)[1:]
    except ValueError:  # a quoted command of its own has a pipe or a semicolon
        return command.split()[1:]


def options_of(parser: Parser, words: list[str]) -> set[str]:
    """Options of a command, those of its actions among them."""
    return {
        option
        for one in parser.subparsers[words[0]].walk()
        for action in one._actions
        for option in action.option_strings
    }


@every_page
def test_commands_and_options_exist(page: Path) -> None:
    parser = parsers()
    for words in command_lines(text_of(page)):
        assert words[0] in {*parser.subparsers, "--version"}, words
        if words[0] in parser.subparsers:
            options = {word.partition("=")[0] for word in words if word.startswith("-")} - {"--"}
            assert options <= options_of(parser, words), words


def test_command_lines_are_found_and_parse() -> None:
    """Those of README.md's tour, and its line for cron, from the first word to the last."""
    parser, whole = parsers(), 0
    for words in command_lines(text_of(TOP / "README.md")):
        if not any(re.fullmatch("[A-Z]+", word) for word in words) and len(words) > 1:
            _, left = parser.parse_known_args(words)
            assert not left, words
            whole += 1
    assert whole > 12


@pytest.mark.parametrize(
    "line", ["# blktrack snyc a b", "# blktrack sync a b --fast", "`blktrack go`"]
)
def test_a_command_that_does_not_exist_is_noticed(line: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(line if line.startswith("`") else f"```console\n{line}\n```\n")
    with pytest.raises((AssertionError, Misused)):
        test_commands_and_options_exist(page)


def headings(page: str) -> set[str]:
    """The anchors that a forge gives them."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(page))):
        if not re.match("https?:", link):
            name, _, anchor = link.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), link
            assert not anchor or anchor in headings(text_of(file)), link


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    for span in spans(text_of(page)):
        if re.fullmatch(r"(blktrack|docs|tests|tools)/[\w./-]+", span):
            assert (TOP / span).exists(), span


def test_every_page_is_linked_from_the_readme() -> None:
    for page in (TOP / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text_of(TOP / "README.md"), page.name


def test_the_exit_codes_are_those_of_the_command() -> None:
    _, _, rest = text_of(TOP / "README.md").partition("| exit | meaning |\n|---|---|\n")
    rows = re.findall(r"^\| (\S+) \| (.*) \|$", rest.partition("\n\n")[0], re.M)
    assert {code: text.replace("`", "") for code, text in rows} == EXITS


@pytest.mark.parametrize("key", sorted({**DEFAULT_KEYS, **DEVICE_KEYS, **REPLICA_KEYS}))
def test_every_key_of_the_policy_is_explained(key: str) -> None:
    assert re.search(rf"^\|[^|]*`{key}`", text_of(TOP / "docs/policy.md"), re.M)


@every_page
def test_examples_of_policies_are_right(page: Path, tmp_path: Path) -> None:
    for number, example in enumerate(re.findall(r"```toml\n(.*?)```", text_of(page), re.S)):
        file = tmp_path / f"{number}.toml"
        file.write_text(example, encoding="utf-8")
        assert list(load(file).links)


def told() -> str:
    """All texts of blktrack, `…` for what varies."""
    texts = []
    for path in (TOP / "blktrack").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{[^}]*\}", "…", node.value))
    return "\n".join(" ".join(text.split()) for text in texts)


def test_messages_of_the_troubleshooting_page_are_told() -> None:
    known = told()
    page = text_of(TOP / "docs/troubleshooting.md")
    tables = re.findall(r"^\| (?:reason|message) \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.M)
    rows = [row.split("|")[1].strip() for table in tables for row in table.splitlines()]
    assert len(rows) > 40
    unknown = []
    for row in rows:
        for message in re.split("; ", row):
            for piece in re.split(r"\s*(?:…|\bN\b)\s*", message):
                if len(piece) > 5 and piece.strip(" :,") not in known:
                    unknown.append(piece)
    assert not unknown
