from __future__ import annotations

import os

import pytest

from tests.vm.machines import DELIBERATE

collect_ignore = [] if DELIBERATE in os.environ else ["test_deliberate.py"]


@pytest.fixture(autouse=True)
def on_each_kernel(kernel: str) -> None:
    """Every test here has the parameter `kernel`, whether it asks for its name or not."""
