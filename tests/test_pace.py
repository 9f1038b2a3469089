"""The level that is chosen, on links that are reckoned."""

from __future__ import annotations

import random
import threading
from collections import Counter
from itertools import pairwise

import pytest

from blktrack.ship.wire.pace import FIXED_MOST, Level
from blktrack.units import KIB, MIB
from tests.links import BATCH, MBIT, Always, Link, Shipment, adaptive, best_fixed

LADDER: list[int | None] = [None, -50, -10, 1, 3, 6, 9, 12]
Batches = list[tuple[str, int]]


def of(kind: str, count: int, size: int = BATCH) -> Batches:
    return [(kind, size)] * count


DATA: dict[str, Batches] = {
    **{kind: of(kind, 128) for kind in ("random", "text", "pages", "sparse")},
    "each in turn": [batch for _ in range(64) for batch in (("random", BATCH), ("pages", BATCH))],
    "eight in turn": [batch for _ in range(8) for batch in of("random", 8) + of("pages", 8)],
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("mbit", [5, 50, 200, 1000, 10000])
def test_next_to_the_best_fixed_level(mbit: int, data: str) -> None:
    link = Link.of(mbit)
    best, which = best_fixed(lambda: Link.of(mbit), DATA[data])
    took = Shipment(adaptive(link), link, DATA[data]).seconds
    print(f"best fixed {which}: {best:.2f} s, adaptive {took:.2f} s, {best / took:.3f}")
    assert best / took > (0.9 if mbit <= 200 else 0.8)


def test_a_small_increment() -> None:
    """40 MiB, in batches as small as a copy makes them then: there is hardly time to learn."""
    for others, mbit in ((0, 5), (0, 50), (8, 5), (8, 50)):
        for kind in ("text", "pages", "sparse", "random"):
            link, data = Link.of(mbit, others=others), of(kind, 40, MIB)
            best, _ = best_fixed(
                lambda mbit=mbit, others=others: Link.of(mbit, others=others),  # type: ignore[misc]
                data,
            )
            took = Shipment(adaptive(link), link, data).seconds
            assert best / took > 0.85, (others, mbit, kind)


@pytest.mark.parametrize("cipher", [0.0, 2.5e-9])
@pytest.mark.parametrize("others", [3, 8])
@pytest.mark.parametrize("data", ["text", "pages", "eight in turn"])
@pytest.mark.parametrize("mbit", [5, 200, 1000])
def test_other_programs_on_the_processors(mbit: int, data: str, others: int, cipher: float) -> None:
    """What compresses faster than the link alone may be far slower than that next to them."""
    link = Link.of(mbit, others=others, cipher=cipher)
    best, _ = best_fixed(lambda: Link.of(mbit, others=others, cipher=cipher), DATA[data])
    assert best / Shipment(adaptive(link), link, DATA[data]).seconds > 0.8


@pytest.mark.parametrize("data", ["random", "each in turn", "eight in turn"])
def test_processors_that_others_use_next_to_a_fast_link(data: str) -> None:
    """Even the fastest level is far too slow then."""
    link = Link.of(10000, others=8, cipher=0.0)
    sent = Shipment(Always(None), Link.of(10000, others=8, cipher=0.0), DATA[data]).seconds
    assert sent / Shipment(adaptive(link), link, DATA[data]).seconds > 0.8


def test_a_link_that_becomes_slow() -> None:
    link = Link([(0.0, 1000 * MBIT), (0.6, 20 * MBIT)])
    done = Shipment(adaptive(link), link, of("pages", 128))
    after = [level or 0 for level, at in zip(done.chosen, done.times, strict=True) if at > 0.6]
    print(done.chosen)
    assert max(level or 0 for level in done.chosen[: -len(after)]) <= 3
    # Four are under way, some more are in the buffer: after 64 MiB it must have been understood.
    assert min(after[16:]) >= 6


def test_a_link_that_becomes_fast() -> None:
    link = Link([(0.0, 20 * MBIT), (15.0, 1000 * MBIT)])
    done = Shipment(adaptive(link), link, of("pages", 512))
    after = [level or 0 for level, at in zip(done.chosen, done.times, strict=True) if at > 15]
    print(done.chosen)
    assert max(after[128:]) <= 3


def test_data_that_cannot_be_compressed_costs_nothing() -> None:
    for mbit in (50, 1000, 10000):
        link, data = Link.of(mbit), of("random", 256)
        best, _ = best_fixed(lambda mbit=mbit: Link.of(mbit), data)  # type: ignore[misc]
        assert best / Shipment(adaptive(link), link, data).seconds > 0.98, mbit


@pytest.mark.parametrize("mbit", [20, 200, 1000])
def test_data_that_can_be_compressed_after_all(mbit: int) -> None:
    """Nothing that was learned of one kind of data stands in the way of the other."""
    link, data = Link.of(mbit), of("random", 128) + of("pages", 256)
    done = Shipment(adaptive(link), link, data)
    print(done.chosen)
    link = Link.of(mbit)
    alone = Shipment(adaptive(link), link, of("pages", 256))
    late = [each.times[-1] - each.times[-128] for each in (alone, done)]
    assert late[0] / late[1] > 0.9


def test_sent_as_it_is_until_that_does_not_pay() -> None:
    """Where nothing is compressed the data is still looked at now and then."""
    link = Link.of(10000, cipher=0.0)
    done = Shipment(adaptive(link), link, of("text", 192) + of("sparse", 256))
    print(done.chosen)
    before, after = done.chosen[64:192], done.chosen[192:]
    assert before.count(None) > 100
    assert any(level is not None for level in before)
    assert after[-96:].count(None) < 10


@pytest.mark.parametrize("kind", ["text", "pages", "sparse", "random"])
@pytest.mark.parametrize("mbit", [5, 50, 200, 1000, 10000])
def test_it_settles(mbit: int, kind: str) -> None:
    link = Link.of(mbit)
    late = Shipment(adaptive(link), link, of(kind, 256)).chosen[64:]
    rungs = [LADDER.index(level) for level in late]
    print(late)
    assert sum(a != b for a, b in pairwise(rungs)) < len(rungs) / 3
    near = [rung for rung in rungs if abs(rung - _middle(Counter(late))) <= 1]
    assert len(near) > 0.9 * len(rungs)


def _middle(levels: Counter[int | None]) -> int:
    """The rung that was chosen most often."""
    return LADDER.index(levels.most_common(1)[0][0])


@pytest.mark.parametrize("lost", [0, 4])
def test_a_pause_is_not_slowness(lost: int) -> None:
    """Also if threads ended without a word before, as their connection broke."""
    chosen = []
    for pause in (0.0, 10_000.0):
        link = Link.of(20)
        level = adaptive(link)
        Shipment(level, link, of("pages", 64))
        for _ in range(lost):
            level.choose()
        link.now += pause
        link.rates = [(0.0, 1000 * MBIT)]
        chosen.append(Shipment(level, link, of("pages", 128)).chosen)
    assert chosen[0] == chosen[1]


def test_whatever_it_is_told_the_level_is_one_of_its_own(seed: int) -> None:
    rng = random.Random(seed)
    link = Link.of(1)  # for its clock
    for _ in range(20):
        link.processors = rng.choice([1, 2, 64])
        level = adaptive(link)
        for _ in range(500):
            link.now += rng.choice([0.0, 1e-9, rng.random(), 1e6])
            chosen = level.choose()
            assert chosen in LADDER
            raw = rng.choice([0, 1, 512, 64 * KIB, 4 * MIB])
            stored = rng.choice([0, 1, raw // 2, raw, raw + 100])
            seconds = [rng.choice([0.0, 1e-12, rng.random(), 1e9]) for _ in range(3)]
            told = dict(zip(("compress_s", "cpu_s", "send_s"), seconds, strict=True))
            level.note(chosen, raw, stored, **told)


def test_threads_side_by_side(seed: int) -> None:
    level = Level()
    failed: list[BaseException] = []

    def run(number: int) -> None:
        rng = random.Random(seed + number)
        try:
            for _ in range(2000):
                chosen = level.choose()
                assert chosen in LADDER
                cpu = rng.random() / 100
                level.note(chosen, MIB, MIB // 3, compress_s=cpu, cpu_s=cpu, send_s=cpu / 2)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_fixed_level_stays() -> None:
    for level in (1, 7, FIXED_MOST):
        fixed = Level(level)
        fixed.note(fixed.choose(), MIB, MIB, compress_s=9.0, cpu_s=9.0, send_s=0.0)
        assert fixed.choose() == level
    assert Level("none").choose() is None
    for level in (-50, 0, FIXED_MOST + 1):
        with pytest.raises(ValueError, match=f"{level} is not a level"):
            Level(level)
