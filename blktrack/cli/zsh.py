"""The completion of zsh."""

from __future__ import annotations

import re
from collections.abc import Iterator

from blktrack.cli import words
from blktrack.cli.parser import Parser
from blktrack.cli.words import Argument, arguments_of, quoted

_HEAD = r"""#compdef blktrack
# Completion of blktrack for zsh, printed by: blktrack completion zsh

_blktrack_list() {
    local -a found expl
    found=(${(f)"$($2)"})
    _wanted $1 expl $3 compadd -a found
}

_blktrack_read_tracked() {
    @TRACKED@
}

_blktrack_read_links() {
    @LINKS@
}

_blktrack_read_replicas() {
    @REPLICAS@
}

# Block devices, and folders in which there may be more. _files would fall back to any file.
_blktrack_block() {
    if [[ -n $PREFIX ]]; then
        _path_files -g '*(-%b,-/)'
    else
        _path_files -W /dev -P /dev/ -g '*(-%b,-/)'
    fi
}

_blktrack_device() {
    _blktrack_list tracked-devices _blktrack_read_tracked 'tracked device'
}

_blktrack_tracked() {
    _blktrack_device || _blktrack_block
}

_blktrack_either() {
    _blktrack_device || _files
}

_blktrack_target() {
    local ret=1
    _blktrack_list replicas _blktrack_read_replicas 'replica on another host' && ret=0
    _files && ret=0
    return ret
}

_blktrack_link() {
    _blktrack_list links _blktrack_read_links link
}

"""

_TAIL = r"""
if [[ $funcstack[1] == _blktrack ]]; then
    _blktrack "$@"
else
    compdef _blktrack blktrack
fi
"""

_OFFERS = {
    "tracked": "_blktrack_tracked",
    "either": "_blktrack_either",
    "block": "_blktrack_block",
    "link": "_blktrack_link",
    "target": "_blktrack_target",
    "path": "_files",
    "folder": "_files -/",
    "program": "_command_names -e",
    "command": "_blktrack_commands",
    "any": " ",
}


def script(top: Parser) -> str:
    head = _HEAD.replace("@TRACKED@", words.TRACKED).replace("@LINKS@", words.LINKS)
    head = head.replace("@REPLICAS@", words.REPLICAS)
    functions = [line for parser in top.walk() for line in _function(parser)]
    return head + "\n".join(functions) + "\n" + _TAIL


def _function(parser: Parser) -> Iterator[str]:
    """Completes what follows the name of a command or action."""
    name = _name(parser)
    below = f"{name}_command" if name == "_blktrack" else name
    listing = "_blktrack_commands" if name == "_blktrack" else f"{name}_actions"
    if parser.subparsers:
        yield f"{listing}() {{"
        yield "    local -a list=("
        for action, summary in parser.summaries.items():
            yield f"        {quoted(f'{action}:{summary}')}"
        yield "    )"
        yield "    _describe -t commands command list"
        yield "}"
        yield ""
    yield f"{name}() {{"
    yield "    local curcontext=$curcontext state line ret=1"
    yield "    typeset -A opt_args"
    specs = [spec for argument in arguments_of(parser) for spec in _specs(argument)]
    if parser.subparsers:
        specs += [quoted(f"1: :{listing}"), quoted("*:: :->rest")]
    yield "    _arguments -S -C \\"
    yield from (f"        {spec} \\" for spec in specs)
    yield "        && ret=0"
    if parser.subparsers:
        yield f"    [[ $state == rest ]] && (( $+functions[{below}_$words[1]] )) &&"
        yield f"        {below}_$words[1] && ret=0"
    yield "    return ret"
    yield "}"
    yield ""


def _name(parser: Parser) -> str:
    """_blktrack for all, _blktrack_command_sync for one: apart from the helpers above."""
    first, *rest = parser.prog.split()
    return "_".join([f"_{first}", *(["command"] if rest else []), *rest])


def _specs(argument: Argument) -> Iterator[str]:
    value = ""
    if argument.kind == "words":
        value = f":{argument.label}:({' '.join(argument.choices)})"
    elif argument.kind:
        value = f":{argument.label}:{_OFFERS[argument.kind]}"
    if not argument.names:
        front = "*" if argument.repeats else ":" if argument.optional else ""
        yield quoted(f"{front}{value}")
        return
    told = re.sub(r"([][:\\])", r"\\\1", argument.told)
    others = "" if argument.repeats else f"({' '.join(argument.names)})"
    if argument.names[-1] in ("--help", "--version"):
        others = "(- : *)"
    for name in argument.names:
        front = "*" if argument.repeats else ""
        mark = "=" if value and name.startswith("--") else ""
        yield quoted(f"{others}{front}{name}{mark}[{told}]{value}")
