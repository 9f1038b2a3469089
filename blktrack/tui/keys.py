"""What was typed, from the bytes that a terminal sends."""

from __future__ import annotations

import re

_ESCAPE = "\x1b"
# CSI and SS3 sequences (ECMA-48): parameters, then one final letter.
_SEQUENCE = re.compile(r"\x1b(?:\[([0-9;?]*)([@-~])|O([@-~]))")
_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;?]*|O)?")
_LETTERS = {"A": "up", "B": "down", "H": "home", "F": "end"}
_NUMBERS = {"5": "page up", "6": "page down", "1": "home", "4": "end", "7": "home", "8": "end"}


class Keys:
    """Remembers a sequence of which only the beginning has come: slow lines send it in pieces."""

    def __init__(self) -> None:
        self._rest = ""

    @property
    def waiting(self) -> bool:
        """Whether more is to come, or the escape key was pressed alone."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """Names of keys; of sequences that mean nothing here, nothing."""
        text, self._rest = self._rest + data.decode("ascii", "replace"), ""
        found = []
        while text:
            if text[0] != _ESCAPE:
                found.append(text[0])
                text = text[1:]
            elif match := _SEQUENCE.match(text):
                number, letter, other = match.groups()
                name = _NUMBERS.get(number, "") if letter == "~" else _LETTERS.get(letter or other)
                found += [name] if name else []
                text = text[match.end() :]
            elif _UNFINISHED.fullmatch(text):
                self._rest, text = text, ""
            else:
                text = text[1:]
                found.append("escape")
        return found

    def flush(self) -> list[str]:
        """No more came: it was the escape key, or nothing that means anything."""
        found, self._rest = ["escape"] if self._rest == _ESCAPE else [], ""
        return found
