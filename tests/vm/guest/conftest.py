from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def on_each_kernel(kernel: str) -> None:
    """Every test here has the parameter `kernel`, whether it asks for its name or not."""
