"""The completion of bash."""

from __future__ import annotations

from collections.abc import Iterator

from blktrack.cli import words
from blktrack.cli.parser import Parser
from blktrack.cli.words import Argument, arguments_of, quoted

_SCRIPT = r"""# Completion of blktrack for bash, printed by: blktrack completion bash

_blktrack_tracked() {
    @TRACKED@
}

_blktrack_links() {
    @LINKS@
}

# Replicas on other hosts.
_blktrack_replicas() {
    @REPLICAS@
}

# Block devices, and folders in which there may be more.
_blktrack_blocks() {
    local path
    compgen -f -- "${1:-/dev/}" | while IFS= read -r path; do
        [[ -b $path || -d $path ]] && printf '%s\n' "$path"
    done
}

# Lines of standard input that begin with $1.
_blktrack_matching() {
    local line
    while IFS= read -r line; do
        [[ $line == "$1"* ]] && printf '%s\n' "$line"
    done
}

# Offer what $1, a kind of argument, may be where $2 is typed.
_blktrack_offer() {
    local kind=$1 typed=$2
    case $kind in
        words:*)
            mapfile -t COMPREPLY < <(compgen -W "${kind#words:}" -- "$typed")
            return ;;
        command) mapfile -t COMPREPLY < <(compgen -W '@COMMANDS@' -- "$typed"); return ;;
        link) mapfile -t COMPREPLY < <(_blktrack_links | sort -u | _blktrack_matching "$typed")
            return ;;
        program) mapfile -t COMPREPLY < <(compgen -c -- "$typed"); return ;;
        tracked | either)
            mapfile -t COMPREPLY < <(_blktrack_tracked | _blktrack_matching "$typed")
            if ((${#COMPREPLY[@]} == 0)) && [[ $kind == either ]]; then
                mapfile -t COMPREPLY < <(compgen -f -- "$typed")
            elif ((${#COMPREPLY[@]} == 0)); then
                mapfile -t COMPREPLY < <(_blktrack_blocks "$typed")
            fi ;;
        block) mapfile -t COMPREPLY < <(_blktrack_blocks "$typed") ;;
        target)
            mapfile -t COMPREPLY < <(_blktrack_replicas | sort -u | _blktrack_matching "$typed"
                compgen -f -- "$typed")
            [[ $typed == ssh:* ]] && return ;;
        path) mapfile -t COMPREPLY < <(compgen -f -- "$typed") ;;
        folder) mapfile -t COMPREPLY < <(compgen -d -- "$typed") ;;
        *) COMPREPLY=(); return ;;
    esac
    compopt -o filenames 2>/dev/null
}

# Of the command or action $1: its options, its arguments, its actions.
_blktrack_spec() {
    options='' arguments='' actions=''
    case $1 in
@SPECS@
    esac
}

# What kind of value option $2 of the command or action $1 takes; '' if none.
_blktrack_value() {
    kind=''
    case "$1 $2" in
@VALUES@
    esac
}

_blktrack() {
    local path=blktrack options arguments actions kind word typed=${COMP_WORDS[COMP_CWORD]}
    local number=0 index glued='' last=''
    _blktrack_spec "$path"
    kind=''
    # bash takes = and : for words of their own.
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        if [[ $word == : || $glued ]]; then
            glued=${word/#[^:]*/}
        elif [[ $kind ]]; then
            [[ $word == = ]] || last=$kind kind=''
        elif [[ $word == -?* ]]; then
            _blktrack_value "$path" "$word"
        elif [[ " $actions " == *" $word "* ]]; then
            path+=" $word" number=0
            _blktrack_spec "$path"
        else
            last=''
            ((number += 1))
        fi
    done
    [[ $typed == = ]] && typed=''
    if [[ $typed == : || $glued ]]; then
        word=${COMP_LINE:0:COMP_POINT}
        typed=${word##*[[:space:]=]} kind=$last
        [[ $last ]] || ((number -= 1))
    fi
    if [[ $kind ]]; then
        _blktrack_offer "$kind" "$typed"
    elif [[ $typed == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$typed")
    elif [[ $actions ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$actions" -- "$typed")
    else
        local -a list
        IFS='|' read -r -a list <<<"$arguments"
        kind=${list[number]-}
        # The last one may come again.
        ((number >= ${#list[@]} && ${#list[@]})) && [[ ${list[-1]} == *+ ]] && kind=${list[-1]}
        if [[ $kind ]]; then
            _blktrack_offer "${kind%+}" "$typed"
        else
            mapfile -t COMPREPLY < <(compgen -W "$options" -- "$typed")
        fi
    fi
    if [[ $typed == *:* && $COMP_WORDBREAKS == *:* ]]; then
        word=${typed%"${typed##*:}"}
        COMPREPLY=("${COMPREPLY[@]#"$word"}")
    fi
}

complete -F _blktrack blktrack
"""


def script(top: Parser) -> str:
    parts = {
        "TRACKED": words.TRACKED,
        "LINKS": words.LINKS,
        "REPLICAS": words.REPLICAS,
        "COMMANDS": " ".join(top.subparsers),
        "SPECS": "\n".join(line for parser in top.walk() for line in _spec(parser)),
        "VALUES": "\n".join(line for parser in top.walk() for line in _values(parser)),
    }
    text = _SCRIPT
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _spec(parser: Parser) -> Iterator[str]:
    found = arguments_of(parser)
    options = " ".join(name for argument in found for name in argument.names)
    arguments = "|".join(
        _kind(argument) + "+" * argument.repeats for argument in found if not argument.names
    )
    yield f"        {quoted(parser.prog)})"
    yield f"            options={quoted(options)}"
    if arguments:
        yield f"            arguments={quoted(arguments)}"
    if parser.subparsers:
        yield f"            actions={quoted(' '.join(parser.subparsers))}"
    yield "            ;;"


def _values(parser: Parser) -> Iterator[str]:
    for argument in arguments_of(parser):
        if argument.names and argument.kind:
            names = " | ".join(quoted(f"{parser.prog} {name}") for name in argument.names)
            yield f"        {names}) kind={quoted(_kind(argument))} ;;"


def _kind(argument: Argument) -> str:
    return "words:" + " ".join(argument.choices) if argument.choices else argument.kind
