"""The commands of a page of documentation, run word for word, and what they print against what the
page says that they print.

A fenced block with the word `console` is a terminal of root: a line that begins with `# ` is a
command, which a backslash at the end of a line continues; the lines up to the next one are its
output, standard error included. A command succeeds, unless `# echo $?` comes next and shows how it
failed. The commands of one `## ` section run in one shell; those before the first section come
first in each. A comment `<!-- run` ... `-->` holds commands that the reader has no need to see.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

_PROMPT = "# "
_MARK = "\x1e"

# What differs from run to run, in order. Whatever is left has to be the same.
_VARIES = (
    (r", [\d.]+ [KMG]?i?B zero\b", ""),  # whether what a file system changed is zero is up to it
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b", "TIME"),
    (r"\b[A-Z][a-z]{2} \d\d \d\d:\d\d\b", "TIME"),
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID"),
    (r"/dev/loop\d+", "/dev/loopN"),
    (r"/(?:var/)?tmp/[\w.-]*\.\w{6,}", "/TMP"),  # of mktemp
    (r"(?<=/blktrack-demo-)\w{8}", "TMP"),
    (r"\b[0-9a-f]{16}…", "DIGEST"),
    (r"\b[\d,.]*\d(?: |)(?:[KMGT]iB|B)\b(?:/s)?", "SIZE"),
    (r"\b[\d,.]*\d (?:ms|s|min|h|d)\b", "DURATION"),
    (r"\b[\d,.]*\d\b", "N"),
    (r"[━┏┳┓┡╇┩└┴┘─]+", "─"),
    (r"\s+", " "),
)
# Progress is told of what takes long, as anything may on a busy machine.
_PROGRESS = re.compile(
    r".*: (\d[\d:]*( s)? so far"
    r"|[\d.]+ [KMGT]?i?B( of [\d.]+ [KMGT]?i?B)?(, .+/s)?(, \d[\d:]*( s)? to go)?)"
)


@dataclass(frozen=True)
class Command:
    text: str
    line: int  # in the page
    output: tuple[str, ...] = ()
    shown: bool = True


@dataclass
class Section:
    title: str
    commands: list[Command] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    command: Command
    code: int
    output: tuple[str, ...]


def sections(page: str) -> list[Section]:
    """Those of a page; the first has no title, and is what comes before any heading."""
    found = [Section("")]
    inside = ""  # console, another language, or run
    for number, line in enumerate(page.splitlines(), 1):
        if not inside and line.startswith("## "):
            found.append(Section(line.removeprefix("## ").strip()))
        elif not inside and line.startswith("```"):
            inside = line.removeprefix("```").strip() or "text"
        elif not inside and line == "<!-- run":
            inside = "run"
        elif (inside == "run" and line == "-->") or (inside != "run" and line == "```"):
            inside = ""
        elif inside == "run":
            found[-1].commands.append(Command(line, number, shown=False))
        elif inside == "console":
            _add(found[-1].commands, line, number)
    assert not inside, f"a block of {inside} is not closed"
    return found


def _add(commands: list[Command], line: str, number: int) -> None:
    last = commands[-1] if commands else None
    if last is not None and last.text.endswith("\\") and not last.output:
        commands[-1] = replace(last, text=f"{last.text}\n{line}")
    elif line.startswith(_PROMPT):
        commands.append(Command(line.removeprefix(_PROMPT), number))
    else:
        assert last is not None, f"line {number}: output without a command"
        commands[-1] = replace(last, output=(*last.output, line))


def run(
    commands: list[Command],
    *,
    folder: Path,
    env: Mapping[str, str],
    told_as: Mapping[str, str] | None = None,
    patience: float = 200,
) -> list[Result]:
    """Run them in one shell, with mounts of its own, that works in `folder`.

    told_as -- names in the output, of devices and files, and what the page calls them.
    """
    script = folder / "session.sh"
    script.write_text("".join(_step(command) for command in commands), encoding="utf-8")
    shell = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "bash", script],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = shell.communicate(timeout=patience)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # and whatever it left running
    for name, called in (told_as or {}).items():
        printed = re.sub(rf"{re.escape(name)}(?!\w)", called, printed)
    *steps, rest = printed.split(_MARK)
    assert len(steps) == 2 * len(commands), f"the shell ended early:\n{printed}"
    assert not rest.strip(), rest
    return [
        Result(command, int(code), tuple(output.splitlines()))
        for command, output, code in zip(commands, steps[::2], steps[1::2], strict=True)
    ]


def _step(command: Command) -> str:
    """A command, then its exit code between marks; `$?` is kept for the next."""
    return f"{command.text}\n_code=$?; printf '{_MARK}%d{_MARK}' $_code; (exit $_code)\n"


def same_everywhere(line: str) -> str:
    """A line without what differs from run to run."""
    for pattern, name in _VARIES:
        line = re.sub(pattern, name, line)
    return line.strip()


def differences(results: list[Result]) -> Iterator[str]:
    """Where what came is not what the page says, a text for each command."""
    for index, result in enumerate(results):
        command = result.command
        following = results[index + 1].command.text if index + 1 < len(results) else ""
        if result.code and following != "echo $?":
            yield f"line {command.line}: {command.text}: exit code {result.code}: {result.output}"
        if not command.shown:
            continue
        got = [line for line in result.output if not _PROGRESS.fullmatch(line)]
        if command.text == "echo $?":
            wanted, found = list(command.output), got
        else:
            wanted = [same_everywhere(line) for line in command.output]
            found = [same_everywhere(line) for line in got]
        if wanted != found:
            yield "\n".join(
                [
                    f"line {command.line}: {command.text}: prints",
                    *(f"  {line}" for line in result.output),
                    "where the page says",
                    *(f"  {line}" for line in command.output),
                ]
            )
