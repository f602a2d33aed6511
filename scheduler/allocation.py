"""Which size of each thing to take, when all sizes together have a limit and smaller ones cost more.

This is the multiple-choice knapsack problem. Lagrangian relaxation prices a byte: each item then takes what is least
of cost + price x bytes, which is on the lower convex hull of its choices. The price at which the sum of sizes
crosses the limit gives a lower bound of all costs, and greedy filling from there a solution near it. The gap between the
two is small, so that few partial solutions are left to search for a better one (Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", 1995).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import pairwise

MOST_STATES = 20_000
"""Partial solutions that are kept at a time; with more of them the best may be missed, by the gap at most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to have an item; `cost` is at least 0 and in any unit."""

    nbytes: int
    cost: float


Item = Sequence[Choice]


@dataclass(frozen=True, slots=True)
class Allocation:
    """`picks[i]` is the choice of item i. No choices within the limit cost less than `bound`."""

    picks: tuple[int, ...]
    nbytes: int
    cost: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Step:
    """From one choice on an item's hull to the next larger one; `gain` is the cost that a byte saves."""

    gain: float
    item: int
    pick: int


def least_bytes(items: Sequence[Item]) -> int:
    return sum(min(choice.nbytes for choice in item) for item in items)


def allocate(items: Sequence[Item], limit: int) -> Allocation:
    """Choices of `items` of at most `limit` bytes together that cost least.

    They are never over the limit, and none within it is cheaper as long as MOST_STATES suffice (so a larger
    limit never costs more, and no choice that all items share is better). Of equal ones the first found is taken,
    always the same. ValueError when even the smallest choices are larger than the limit.
    """
    if least_bytes(items) > limit:
        raise ValueError(f"{least_bytes(items)} bytes are the least, {limit} the limit")
    hulls = [hull(item) for item in items]
    price = _price(items, hulls, limit)
    picks = _search(items, limit, price, _greedy(items, hulls, limit))
    nbytes, cost = _totals(items, picks)
    bound = sum(_least_priced(item, price) for item in items) - price * limit
    return Allocation(tuple(picks), nbytes, cost, max(0.0, min(bound, cost)))


def hull(item: Item) -> list[int]:
    """The lower convex hull of cost over bytes: indices of choices, by size, each of less cost than the one before,
    and each saving less a byte."""
    found: list[int] = []
    for pick in sorted(range(len(item)), key=lambda i: (item[i].nbytes, item[i].cost)):
        if found and item[pick].cost >= item[found[-1]].cost:
            continue
        while len(found) > 1 and _gain(item, found[-1], pick) >= _gain(item, *found[-2:]):
            found.pop()
        found.append(pick)
    return found


def _gain(item: Item, small: int, large: int) -> float:
    return (item[small].cost - item[large].cost) / (item[large].nbytes - item[small].nbytes)


def _steps(items: Sequence[Item], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """Those that save most first."""
    steps = [
        _Step(_gain(items[i], small, large), i, large)
        for i, picks in enumerate(hulls)
        for small, large in pairwise(picks)
    ]
    return sorted(steps, key=lambda step: (-step.gain, step.item))


def _price(items: Sequence[Item], hulls: Sequence[Sequence[int]], limit: int) -> float:
    """What a byte is worth at the limit: the saving of the first step that passes it, 0 if none does."""
    picks = [each[0] for each in hulls]
    used, _ = _totals(items, picks)
    for step in _steps(items, hulls):
        item = items[step.item]
        used += item[step.pick].nbytes - item[picks[step.item]].nbytes
        picks[step.item] = step.pick
        if used > limit:
            return step.gain
    return 0.0


def _greedy(items: Sequence[Item], hulls: Sequence[Sequence[int]], limit: int) -> list[int]:
    """From the smallest choices up, the step that saves most a byte first, leaving out what no longer fits."""
    picks = [each[0] for each in hulls]
    left = limit - _totals(items, picks)[0]
    for step in _steps(items, hulls):
        item = items[step.item]
        more = item[step.pick].nbytes - item[picks[step.item]].nbytes
        if more <= left and item[step.pick].cost < item[picks[step.item]].cost:
            picks[step.item], left = step.pick, left - more
    return picks


@dataclass(frozen=True, slots=True)
class _State:
    """Picks of the items so far, the last one and those before it."""

    nbytes: int
    cost: float
    pick: int
    before: "_State | None"


def _search(items: Sequence[Item], limit: int, price: float, known: list[int]) -> list[int]:
    """The cheapest picks; `known` ones if nothing is cheaper.

    A partial solution is given up when what it needs at least, in bytes or by the Lagrangian's bound for what is to
    come, is too much, and when another has neither more bytes nor more cost.
    """
    least = _totals(items, known)[1]
    size = least_bytes(items)
    cost = sum(_least_priced(item, price) for item in items)
    states = [_State(0, 0.0, 0, None)]
    for item in items:
        size -= min(choice.nbytes for choice in item)
        cost -= _least_priced(item, price)
        grown = (
            _State(state.nbytes + choice.nbytes, state.cost + choice.cost, pick, state)
            for state in states
            for pick, choice in enumerate(item)
        )
        states = _undominated(
            state
            for state in grown
            if state.nbytes + size <= limit
            and state.cost + cost + price * (state.nbytes - limit) < least
        )
        if len(states) > MOST_STATES:
            states = nsmallest(MOST_STATES, states, lambda state: state.cost + price * state.nbytes)
    best = min(states, key=lambda state: state.cost, default=None)
    return known if best is None or best.cost >= least else _picks(best)


def _undominated(states: Iterable[_State]) -> list[_State]:
    found: list[_State] = []
    for state in sorted(states, key=lambda state: (state.nbytes, state.cost)):
        if not found or state.cost < found[-1].cost:
            found.append(state)
    return found


def _picks(last: _State) -> list[int]:
    picks = []
    while last.before is not None:
        picks.append(last.pick)
        last = last.before
    return picks[::-1]


def _least_priced(item: Item, price: float) -> float:
    return min(choice.cost + price * choice.nbytes for choice in item)


def _totals(items: Sequence[Item], picks: Sequence[int]) -> tuple[int, float]:
    chosen = [item[pick] for item, pick in zip(items, picks, strict=True)]
    return sum(choice.nbytes for choice in chosen), sum(choice.cost for choice in chosen)
