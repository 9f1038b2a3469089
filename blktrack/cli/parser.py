"""The parser of a command, and of each of its actions: what help, man pages and completion are
made from.

What a description says comes from a docstring: prose, and examples, which are the paragraphs whose
lines are all indented or begin with `blktrack`. A command's is that of its module, an action's is
given to `add_parser`. Exit codes are the ones that every command has and those of the module's
`EXITS`: keys of EXITS here, or such keys with what they mean there.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from blktrack.errors import UsageError

WIDTH = 80  # columns, as long as the terminal has them

# The outside contract.
EXITS = {
    "0": "done",
    "1": "failed; nothing was half-done, and the message says what to do",
    "2": "wrong usage",
    "3": "a resync is needed and --no-resync forbade it, or the device is not tracked",
    "4": "no consistent point was reached, or not in the time allowed; the replica is still at its "
    "previous point, or unfinished if that was given up before",
    "5": "the replica differs from its device",
    "6": "busy: another run holds this device or replica, or it is in use",
    "128+N": "stopped by signal N; what was done so far is kept",
}
_ALWAYS = ("0", "1", "2")


class Misused(UsageError):
    """The words after `program` make no sense to it."""

    def __init__(self, message: str, *, program: str, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"see {program} --help")
        self.program = program


@dataclass(frozen=True)
class Text:
    """A docstring, taken apart."""

    prose: tuple[str, ...]  # paragraphs, each of one line
    examples: tuple[str, ...]  # blocks of lines

    @classmethod
    def of(cls, doc: str) -> Text:
        prose, examples = [], []
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc).rstrip()):
            lines = paragraph.splitlines()
            if all(line.startswith((" ", "blktrack ")) for line in lines):
                examples.append(textwrap.dedent(paragraph))
            else:
                prose.append(" ".join(line.strip() for line in lines))
        return cls(tuple(prose), tuple(examples))


class Formatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves lines that are indented as they are."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((WIDTH, 24)).columns
        super().__init__(prog, width=min(columns, WIDTH) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            paragraph if "\n" in paragraph else textwrap.fill(paragraph, width)
            for paragraph in text.split("\n\n")
        )

    def _format_action(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse._SubParsersAction):
            return super()._format_action(action)
        rows = {choice.dest: choice.help or "" for choice in action._choices_actions}
        column = max(map(len, rows)) + 2
        return "".join(f"{_row(name, text, column)}\n" for name, text in rows.items())


class Parser(argparse.ArgumentParser):
    """Raises Misused instead of printing and exiting, and suggests what was meant."""

    def __init__(self, *, description: str = "", **rest: Any) -> None:
        rest.setdefault("formatter_class", Formatter)
        rest.setdefault("allow_abbrev", False)
        super().__init__(**rest)
        self.exits: dict[str, str] = {}
        self.text = Text((), ())
        self.set_defaults(parser_=self)  # the innermost one that took part
        self.describe(description)

    def describe(self, doc: str, exits: Iterable[str] = ()) -> None:
        """Take text from a docstring, and a module's EXITS."""
        own = exits if isinstance(exits, Mapping) else {}
        self.text = Text.of(doc)
        self.exits = {
            key: own.get(key, meaning)
            for key, meaning in EXITS.items()
            if key in {*_ALWAYS, *exits}
        }
        self.description = "\n\n".join(self.text.prose)
        self.epilog = _epilog(self.text.examples, self.exits)

    @property
    def subparsers(self) -> dict[str, Parser]:
        """Those of its commands or actions."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    @property
    def summaries(self) -> dict[str, str]:
        """What is told of each of those in a list."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return {choice.dest: choice.help or "" for choice in action._choices_actions}
        return {}

    @property
    def arguments(self) -> list[argparse.Action]:
        """In the order of their adding."""
        return list(self._actions)

    def help_of(self, action: argparse.Action) -> str:
        """What is told of it, with its default filled in."""
        return self._get_formatter()._expand_help(action) if action.help else ""

    def walk(self) -> Iterator[Parser]:
        """This one, then those of its actions."""
        yield self
        for parser in self.subparsers.values():
            yield from parser.walk()

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ([^:]*): ", lambda match: f"{_named(match[1])}: ", message)
        message = message.replace(": expected one argument", " needs a value")
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            names = missing[1].split(", ")
            verb = "is" if len(names) == 1 else "are"
            message = f"{' and '.join(names)} {verb} missing"
        raise Misused(message, program=self.prog)

    def refuse(self, words: list[str]) -> NoReturn:
        """Words that were left over."""
        option = next((word for word in words if word.startswith("-") and word != "-"), None)
        if option is None:
            self.error(f"{words[0]!r} is one argument too many")
        name = option.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        self.error(f"there is no option {name}{_meant(name, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        meant = _meant(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            kind = "command" if action.metavar == "COMMAND" else "action"
            self.error(f"there is no {kind} {value!r}{meant or _one_of(known, kind)}")
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(known)}{meant}")


def _epilog(examples: tuple[str, ...], exits: dict[str, str]) -> str:
    parts = []
    if examples:
        shown = "\n".join(textwrap.indent(example, "  ") for example in examples)
        parts.append(f"examples:\n{shown}")
    if len(exits) > len(_ALWAYS):
        parts.append("exit codes:\n" + "\n".join(_row(*row, 7) for row in exits.items()))
    return "\n\n".join(parts)


def _row(name: str, text: str, column: int) -> str:
    return textwrap.fill(
        f"  {name:{column}}{text}", WIDTH - 2, subsequent_indent=" " * (column + 2)
    )


def _named(name: str) -> str:
    """The long one of an option's names."""
    return name.rsplit("/", maxsplit=1)[-1]


def _meant(word: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _one_of(known: list[str], kind: str) -> str:
    return f"; there are {', '.join(known)}" if kind == "action" else ""
