"""The slots' policy: what it must never do, and what it hits."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.streaming.slot_cache import SlotCache


def hits(cache: SlotCache[int], keys: Iterable[int]) -> int:
    """Use one key after another; how many were there."""
    found = 0
    for key in keys:
        cache.use(key)
        if key in cache:
            found += 1
        elif cache.take(key) is not None:
            cache.unpin(key)
    return found


def zipf(count: int, keys: int, seed: int) -> list[int]:
    """Draws with probabilities 1 / rank, ranks being shuffled."""
    generator = random.Random(seed)
    names = generator.sample(range(keys), keys)
    return generator.choices(names, [1 / (rank + 1) for rank in range(keys)], k=count)


STEPS = st.lists(
    st.tuples(st.sampled_from(["use", "take", "pin", "unpin", "drop"]), st.integers(0, 11))
)


@given(STEPS, st.integers(1, 6), st.integers(0, 6))
def test_slots_hold_one_key_each_and_pinned_keys_stay(
    steps: list[tuple[str, int]], slots: int, transit: int
) -> None:
    cache: SlotCache[int] = SlotCache(slots=slots, transit=min(transit, slots), keys=3)
    pins = dict.fromkeys(range(12), 0)
    for step, key in steps:
        pinned = {k: cache.slot(k) for k in pins if pins[k]}
        if step == "use":
            cache.use(key)
        elif step == "take" and key not in cache:
            pins[key] += cache.take(key) is not None
        elif step == "pin" and key in cache:
            cache.pin(key)
            pins[key] += 1
        elif step == "unpin" and pins[key]:
            cache.unpin(key)
            pins[key] -= 1
        elif step == "drop" and key in cache and not pins[key]:
            cache.drop(key)
            assert key not in cache
        assert all(cache.slot(k) == slot for k, slot in pinned.items())
        held = [cache.slot(k) for k in pins if k in cache]
        assert len(set(held)) == len(held) == len(cache) <= slots
        assert all(cache.is_pinned(k) == bool(pins[k]) for k in pins)
        assert sum(cache.is_kept(k) for k in pins) <= slots


@given(STEPS, st.integers(1, 6), st.integers(1, 6))
def test_a_key_finds_a_slot_while_a_transit_slot_is_not_pinned(
    steps: list[tuple[str, int]], slots: int, transit: int
) -> None:
    cache: SlotCache[int] = SlotCache(slots=slots, transit=min(transit, slots), keys=3)
    for _, key in steps:
        cache.use(key)
        if key not in cache:
            assert cache.take(key) is not None
            cache.unpin(key)


@pytest.mark.parametrize("transit", [0, 1, 4])
def test_a_cyclic_scan_hits_what_is_kept(transit: int) -> None:
    """For longer than counts live: they are halved within these passes."""
    cache: SlotCache[int] = SlotCache(slots=20, transit=transit, keys=50)
    hits(cache, range(50))
    for _ in range(30):
        assert hits(cache, range(50)) == 20 - transit


def test_all_keys_have_room() -> None:
    cache: SlotCache[int] = SlotCache(slots=50, transit=4, keys=50)
    hits(cache, range(50))
    assert hits(cache, range(50)) == 50


def test_skewed_use_beats_a_static_set() -> None:
    draws = zipf(20_000, keys=400, seed=1)
    cache: SlotCache[int] = SlotCache(slots=40, transit=8, keys=400)
    static = set(dict.fromkeys(draws[:200]))
    static = set(list(static)[:40])
    found = hits(cache, draws)
    assert found > 1.2 * sum(key in static for key in draws)
    best = set(sorted(set(draws), key=draws.count)[-32:])
    assert found > 0.9 * sum(key in best for key in draws)


def test_what_is_used_changes_and_the_cache_follows() -> None:
    cache: SlotCache[int] = SlotCache(slots=20, transit=4, keys=200)
    hits(cache, zipf(5000, keys=200, seed=2))
    draws = zipf(10_000, keys=200, seed=3)
    hits(cache, draws[:5000])
    best = set(sorted(set(draws), key=draws.count)[-16:])
    assert hits(cache, draws[5000:]) > 0.85 * sum(key in best for key in draws[5000:])


def test_a_newcomer_that_is_used_more_swaps_roles_and_keeps_its_slot() -> None:
    cache: SlotCache[str] = SlotCache(slots=2, transit=1, keys=10)
    for key in ("a", "b"):
        cache.use(key)
        cache.take(key)
        cache.unpin(key)
    slots = {key: cache.slot(key) for key in "ab"}
    assert cache.is_kept("a") and not cache.is_kept("b")
    cache.use("b")
    assert cache.is_kept("a")
    cache.use("b")
    assert cache.is_kept("b") and not cache.is_kept("a")
    assert {key: cache.slot(key) for key in "ab"} == slots
    assert cache.take("c") == slots["a"]


def test_without_transit_slots_most_newcomers_get_none() -> None:
    cache: SlotCache[str] = SlotCache(slots=0, transit=0, keys=10)
    assert cache.take("a") is None
    assert cache.add_slot() == 0
    cache.use("a")
    assert cache.take("a") == 0
    cache.use("b")
    assert cache.take("b") is None
    cache.use("b")
    cache.use("b")
    assert cache.take("b") is None, "the least used entry is pinned"
    cache.unpin("a")
    assert cache.take("b") == 0
    assert "a" not in cache
