"""Which experts nearly every pass reaches, as counted from all passes."""

import random

import pytest

from headrace.runtime.streaming.reach_history import ReachHistory
from headrace.scheduler.experts import LIKELY, RECENT


@pytest.mark.parametrize("seed", range(5))
def test_likely_is_what_enough_of_the_last_passes_reached(seed: int) -> None:
    generator, history = random.Random(seed), ReachHistory()
    rates = [generator.choice((0.0, 0.1, 0.7, 0.9, 1.0)) for _ in range(12)]
    passes: list[set[int]] = []
    for number in range(1, 60):
        if number == 30:
            generator.shuffle(rates)
        passes.append({e for e, rate in enumerate(rates) if generator.random() < rate})
        assert history.reach(number, sorted(passes[-1])) == sorted(passes[-1])
        recent = passes[-RECENT:]
        expected = [e for e in range(12) if sum(e in one for one in recent) >= LIKELY]
        assert history.likely() == expected


def test_micro_batches_of_a_pass_count_once() -> None:
    history = ReachHistory()
    for number in range(1, LIKELY + 1):
        assert history.likely() == []
        assert history.reach(number, [2, 5]) == [2, 5]
        assert history.reach(number, [2, 7]) == [7]
        assert history.reach(number, []) == []
    assert history.likely() == [2, 5, 7]


def test_passes_that_reach_nothing_count() -> None:
    history = ReachHistory()
    for number in range(1, RECENT + 1):
        history.reach(number, [3])
    for number in range(RECENT + 1, 2 * RECENT - LIKELY + 1):
        history.reach(number, [])
        assert history.likely() == [3]
    history.reach(2 * RECENT, [])
    assert history.likely() == []
