"""Sizes within a limit, against all combinations of them."""

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scheduler.allocation import Choice, allocate, hull, least_bytes

choices = st.builds(Choice, st.integers(1, 60), st.integers(0, 1000).map(lambda n: n / 64))
few_items = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=6)


@st.composite
def sized(draw):
    """Items of the same formats, as a model's matrices are: the larger, the better."""
    count = draw(st.integers(1, 60))
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    items = []
    for _ in range(count):
        weights, sensitivity = rng.choice((4096, 6000, 32768)), rng.lognormvariate(0, 2)
        items.append(
            [
                Choice(weights * bits // 8, 0.0 if bits == 16 else sensitivity * 4.0**-bits)
                for bits in (3, 4, 8, 16)
            ]
        )
    return items


def totals(items, picks):
    chosen = [item[pick] for item, pick in zip(items, picks, strict=True)]
    return sum(c.nbytes for c in chosen), sum(c.cost for c in chosen)


@given(few_items, st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_nothing_within_the_limit_is_cheaper(items, spare):
    limit = least_bytes(items) + spare
    found = allocate(items, limit)
    every = (totals(items, picks) for picks in product(*(range(len(item)) for item in items)))
    best = min(cost for nbytes, cost in every if nbytes <= limit)
    assert (found.nbytes, found.cost) == totals(items, found.picks)
    assert found.nbytes <= limit
    assert found.cost == pytest.approx(best)
    assert found.bound <= found.cost + 1e-9


@given(sized(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_larger_limit_never_costs_more_and_one_format_for_all_is_never_better(items, one, other):
    least = least_bytes(items)
    most = sum(max(choice.nbytes for choice in item) for item in items)
    limits = sorted(int(least + share * (most - least)) for share in (one, other))
    small, large = (allocate(items, limit) for limit in limits)
    assert small.nbytes <= limits[0] and large.nbytes <= limits[1]
    assert large.cost <= small.cost + 1e-12
    for pick in range(4):
        nbytes, cost = totals(items, [pick] * len(items))
        for limit, found in zip(limits, (small, large), strict=True):
            assert nbytes > limit or found.cost <= cost + 1e-12


def test_a_large_model_is_decided_within_a_thousandth_of_the_bound():
    rng = random.Random(1)
    items = []
    for index in range(400):
        size, sensitivity = (1 << 24, 3 << 24)[index % 2], rng.lognormvariate(0, 1.5)
        items.append(
            [Choice(size * b // 32, sensitivity * 4.0 ** (-b / 4)) for b in (13, 17, 33, 64)]
        )
    limit = int(1.3 * least_bytes(items))
    found = allocate(items, limit)
    assert found.nbytes <= limit
    assert found.cost <= 1.001 * found.bound


def test_with_room_for_everything_the_best_is_taken_and_with_too_little_nothing():
    items = [[Choice(4, 1.0), Choice(8, 0.0)], [Choice(2, 3.0), Choice(9, 0.5), Choice(5, 0.5)]]
    found = allocate(items, 100)
    assert found.picks == (1, 2) and found.cost == found.bound == 0.5
    with pytest.raises(ValueError, match="6 bytes are the least"):
        allocate(items, 5)


def test_a_hull_has_what_pays_for_its_bytes():
    # The third costs more than what lies between its neighbours; the last one is larger and no better.
    item = [Choice(8, 0.0), Choice(1, 10.0), Choice(2, 9.9), Choice(4, 2.0), Choice(9, 0.0)]
    assert hull(item) == [1, 3, 0]
