"""The running kernel is as was asked for, and one that blktrack can work on."""

from __future__ import annotations

import os

import pytest

from tests.blockdev import Lab

pytestmark = pytest.mark.needs("root", "bpf")


@pytest.mark.brief
def test_kernel_is_the_one_asked_for(kernel: str) -> None:
    assert kernel == "newest" or os.uname().release.startswith(f"{kernel}.")


def test_doctor_finds_all_in_order(lab: Lab) -> None:
    done = lab.blktrack("doctor", "--json")
    assert done.code == 0, done.out
