"""Runs of aligned units for which a test gives one answer: what is zero, what is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def runs(
    start: int, end: int, unit: int, shift: int, test: Callable[[int, int], bool]
) -> Iterator[tuple[int, int, bool]]:
    """(start, end, answer) of the longest runs of aligned units for which `test` says the same.

    `test` takes a place, `shift` after the start, and a length.
    """
    begin, answer = start, None
    while start < end:
        stop = min(end, (start // unit + 1) * unit)
        says = test(start + shift, stop - start)
        if says is not answer and answer is not None:
            yield begin, start, answer
            begin = start
        answer = says
        start = stop
    if answer is not None:
        yield begin, end, answer
