"""What a client of ssh asked for, where the command of its key is `blktrack recv --restrict`.

sshd runs the command of the key instead and tells in SSH_ORIGINAL_COMMAND what was wanted: text of
the other host, which no shell ever sees here. Two commands are understood, as words and nothing
else; what a shell would act on, quoted or not, is refused.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from blktrack.errors import UsageError

VARIABLE = "SSH_ORIGINAL_COMMAND"

_MOST = 8192  # characters: more than any path has
_SHELL = re.compile(r"[^\w '\"%+,./:=@-]")  # all but words, blanks, quotes and plain signs
_OPTIONS = {"--force", "--json", "--quiet"}


@dataclass(frozen=True)
class Wanted:
    """To speak the protocol; with a target, to receive a delta into it."""

    target: str = ""  # as the client wrote it
    force: bool = False
    json: bool = False
    quiet: bool = False


def parse(command: str) -> Wanted:
    """What is wanted by a command of another host. UsageError if it is anything else."""
    if not command.strip():
        return Wanted()
    try:
        words = [] if _SHELL.search(command[:_MOST]) else shlex.split(command[:_MOST])
    except ValueError:  # a quote is open
        words = []
    if len(command) > _MOST or len(words) < 3 or not _is_recv(words[0], words[1]):
        raise _refusal(command)
    rest = words[2:]
    if rest == ["--serve"]:
        return Wanted()
    options = {word for word in rest if word.startswith("-")}
    targets = [word for word in rest if not word.startswith("-")]
    if len(targets) != 1 or not targets[0] or not options <= _OPTIONS:
        raise _refusal(command)
    return Wanted(
        targets[0],
        force="--force" in options,
        json="--json" in options,
        quiet="--quiet" in options,
    )


def _is_recv(program: str, command: str) -> bool:
    return program.rpartition("/")[2] == "blktrack" and command == "recv"


def _refusal(command: str) -> UsageError:
    shown = command if len(command) <= 100 else f"{command[:100]}..."
    return UsageError(
        f"this key is for replicas alone, and {shown!r} was asked for",
        hint="it takes blktrack sync, or blktrack recv TARGET with --json, --quiet or --force,"
        " without anything that a shell would act on",
    )
