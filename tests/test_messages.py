"""Every message that a user may come to see is reached by a test."""

from __future__ import annotations

import pytest

from tests.reached import WHOLE, never_reached


def test_every_message_is_reached() -> None:
    """Runs last."""
    if WHOLE.why_not:
        pytest.skip(WHOLE.why_not)
    if WHOLE.skipped:
        pytest.skip(f"{len(WHOLE.skipped)} tests were skipped")
    assert [str(site) for site in never_reached()] == []
