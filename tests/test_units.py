"""Sizes and durations: what is written reads back, what is no size is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blktrack.errors import UsageError
from blktrack.units import (
    GIB,
    KIB,
    MIB,
    format_duration,
    format_promise,
    format_rate,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64K", 64 * KIB),
        ("64k", 64 * KIB),
        ("64KB", 64 * KIB),
        ("64KiB", 64 * KIB),
        (" 4 MiB ", 4 * MIB),
        ("1.5G", GIB + GIB // 2),
        ("0.5K", 512),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("16E", 16 << 60),
        # More digits than a double holds.
        ("9007199254740993", 2**53 + 1),
        ("9007199254740993.0", 2**53 + 1),
    ],
)
def test_parse(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "K",
        "-1",
        "+1",
        "1 000",
        "1,5G",
        "1e3",
        "0x10",
        "1.G",
        ".5G",
        "4KK",
        "4X",
        "4 bytes",
        "inf",
        "nan",
        "0.5",  # half a byte
        "0.3K",
        "1\u212a",  # the Kelvin sign, which is a K only when case is ignored
        "\u0663K",  # a digit, but not one of ours
        "1" * 5000,  # more than int() takes
        "1" * 400 + ".0",  # more than a double takes
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.hint
    assert caught.value.exit_code == 2


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) >= 0


@given(st.integers(0, 2**64), st.sampled_from(["", "K", "M", "G", "T", "P", "E"]))
def test_parse_whole_numbers(number: int, suffix: str) -> None:
    power = " KMGTPE".index(suffix) if suffix else 0
    for spelling in {suffix, suffix.lower(), f"{suffix}B", f"{suffix}iB" if suffix else ""}:
        assert parse_size(f"{number}{spelling}") == number * 1024**power


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 * KIB, "10 KiB"),
        (999 * KIB, "999 KiB"),
        (999.6 * KIB, "0.98 MiB"),
        (1000 * KIB, "0.98 MiB"),
        (23 * MIB, "23 MiB"),
        (1.234 * GIB, "1.23 GiB"),
        (-1536, "-1.5 KiB"),
        (4 << 40, "4 TiB"),
        (5000 * 2**60, "5000 EiB"),  # nothing comes after it
    ],
)
def test_format_size(count: float, expected: str) -> None:
    assert format_size(count) == expected


@given(st.integers(0, 2**60))
def test_formatted_size_reads_back(count: int) -> None:
    text = format_size(count)
    number, unit = text.split()
    assert len(number.replace(".", "").strip("0")) <= (4 if unit == "B" else 3)
    scale = parse_size(f"1{unit}")
    assert abs(float(number) * scale - count) <= count * 0.006


def test_format_rate() -> None:
    assert format_rate(3 * MIB, 2) == "1.5 MiB/s"
    assert format_rate(3 * MIB, 0) == "-"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.00 s"),
        (0.25, "0.25 s"),
        (12.34, "12.3 s"),
        (59.9, "59.9 s"),
        (60, "1:00"),
        (185, "3:05"),
        (3599.7, "1:00:00"),
        (7385, "2:03:05"),
        (100 * 3600, "100:00:00"),
    ],
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.5, "0.5s"),
        (15, "15s"),
        (90, "1m30s"),
        (600, "10m"),
        (86400, "1d"),
        (129600, "1d12h"),
        (604800, "7d"),
        (3600.25, "1h0.25s"),
    ],
)
def test_a_promise_is_told_as_a_policy_says_it(seconds: float, expected: str) -> None:
    assert format_promise(seconds) == expected
    assert parse_duration(expected) == seconds
