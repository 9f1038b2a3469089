"""What a shell may offer for an argument, whichever shell."""

from __future__ import annotations

import argparse
import re
import textwrap
from dataclasses import dataclass

from blktrack.cli.parser import Parser

# By metavar. The shells know these kinds: see _blktrack_offer in each of them.
_KINDS = {
    "DEVICE": "tracked",
    "TARGET": "target",
    "T": "target",
    "FILE": "path",
    "DIR": "folder",
    "CMD": "program",
    "NAME": "link",
    "COMMAND": "command",
}
# Where DEVICE is most likely none of the tracked ones, or may be a replica.
_OTHERS = {"blktrack track": "block", "blktrack status": "either", "blktrack recv": "block"}
_HERE = ("blktrack recv",)  # where TARGET is none of another host

# Of every tracked device, link, or replica on another host, as its JSON in `state` holds them: one
# key a line.
TRACKED = r"""sed -n 's/^ "path": "\([^"\\]*\)",\{0,1\}$/\1/p' """ + (
    '"${BLKTRACK_ROOT-}"/var/lib/blktrack/devices/*/device.json 2>/dev/null'
)
LINKS = r"""sed -n 's/^ "name": "\([^"\\]*\)",\{0,1\}$/\1/p' """ + (
    '"${BLKTRACK_ROOT-}"/var/lib/blktrack/devices/*/links/*.json 2>/dev/null'
)
REPLICAS = r"""sed -n 's/^ "target": "\(ssh:[^"\\]*\)",\{0,1\}$/\1/p' """ + (
    '"${BLKTRACK_ROOT-}"/var/lib/blktrack/devices/*/links/*.json 2>/dev/null'
)


@dataclass(frozen=True)
class Argument:
    """An option or a positional argument."""

    names: tuple[str, ...]  # of an option; () for a positional one
    label: str
    kind: str  # "" if it takes no value, "words" if one of `choices`, "any" if nobody knows
    choices: tuple[str, ...]
    told: str  # in a few words
    repeats: bool
    optional: bool


def arguments_of(parser: Parser) -> list[Argument]:
    """All but the actions. Of positional ones only the last is optional: what follows such a one
    would be offered with it."""
    last = next((a for a in reversed(parser.arguments) if not a.option_strings), None)
    return [
        Argument(
            names=tuple(action.option_strings),
            label=str(action.metavar or action.dest.upper()),
            kind=_kind(parser, action),
            choices=tuple(str(choice) for choice in action.choices or ()),
            told=_brief(parser.help_of(action)),
            repeats=action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction),
            optional=action.nargs in ("?", "*") and action is last,
        )
        for action in parser.arguments
        if not isinstance(action, argparse._SubParsersAction)
    ]


def _kind(parser: Parser, action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "words"
    kind = _KINDS.get(str(action.metavar), "any")
    if kind == "target" and parser.prog in _HERE:
        return "path"
    return _OTHERS.get(parser.prog, kind) if kind == "tracked" else kind


def _brief(text: str) -> str:
    return textwrap.shorten(re.split(r"[;:.(] ?", text, maxsplit=1)[0], 60, placeholder=" ...")


def quoted(text: str) -> str:
    """As one word of either shell."""
    return "'" + text.replace("'", "'\\''") + "'"
