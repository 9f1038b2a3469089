"""Every message that a user may come to see is reached by a test."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from blktrack.errors import Refused
from tests.blockdev import Silent
from tests.message_sites import PACKAGE, marked_code, sites_in
from tests.reached import WHOLE, never_reached
from tests.recorder.sitecustomize import ROOM

ERRORS = {"Refused", "Own"}


# What no test can come to, by module, function and first words, and why.
OUT_OF_REACH = {
    ("ship.apply", "apply", "is too small:"): "a replica is refused as too small, or as not of the "
    "size that was recorded, before anything is staged for it or brought in: only a source that "
    "grows in between would come here",
}


def test_every_message_is_reached() -> None:
    """Runs last."""
    if WHOLE.why_not:
        pytest.skip(WHOLE.why_not)
    if WHOLE.skipped:
        pytest.skip(f"{len(WHOLE.skipped)} tests were skipped")
    missed = never_reached()
    assert [str(site) for site in missed if site.key not in OUT_OF_REACH] == []
    assert OUT_OF_REACH.keys() <= {site.key for site in missed}, "it can be reached after all"


def test_places_are_found_and_marked() -> None:
    """A place in each way of writing one, and what is none."""
    source = """
from blktrack.errors import Refused
class Own(Refused): ...
def check(observer, number):
    if number == 1:
        raise Refused(f"{number} is one", hint="none")
    if number == 2:
        return Own("two")
    if number == 3:
        observer.warn("three")
    if number == 4:
        raise ValueError("four")
"""
    path = PACKAGE / "made_up.py"
    code = marked_code(source.encode(), str(path), ERRORS)
    marks = bytearray(ROOM)
    names = {"__name__": "made_up", "__reached__": marks}
    exec(code, names)
    check: Any = names["check"]
    for number, error in ((1, Refused), (2, None), (3, None), (4, ValueError)):
        before = sum(marks)
        with pytest.raises(error) if error else contextlib.nullcontext():
            check(Silent(), number)
        assert sum(marks) - before == (number != 4), number
    found = [(site.function, site.what, site.text) for site in sites_in(source, "made_up", ERRORS)]
    assert found == [
        ("check", "Refused", "is one"),
        ("check", "Own", "two"),
        ("check", "observer.warn", "three"),
    ]
