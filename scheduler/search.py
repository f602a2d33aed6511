"""How many KV pages a layout has, on the device and below it: tried and predicted by the formula."""

from dataclasses import dataclass, replace

from headrace.scheduler.decode import FUSED_ROWS, Decode
from headrace.scheduler.filling import Filling, fill
from headrace.scheduler.memory import Cache, Layout
from headrace.scheduler.placement import Prediction
from headrace.scheduler.predict import predict
from headrace.scheduler.problem import Problem

PAGE_STEPS = 16
"""Page counts that are tried for a layout, evenly spaced up to the most that fit or are wanted."""

GUEST_STEPS = 8
"""Counts of sequences with pages in host RAM that are tried for a layout, and as many of those with some
on NVMe."""

DEVICE_SHARES = (1, 2, 4)
"""Beside these the device holds as many sequences as it can, or one in so many of them."""

WORTH_IT = 1.02
"""A larger or less simple candidate has to be this much faster."""


@dataclass(frozen=True, slots=True)
class Candidate:
    layout: Layout
    filling: Filling
    cache: Cache
    prediction: Prediction


def search_pages(problem: Problem, layout: Layout) -> Candidate:
    """More pages serve more sequences a pass, fewer pages leave more layers resident.

    Few sequences that reach other experts each are hardly faster together; but a pass that computes
    prompts loads nearly all experts, and more of those share it. So of split layouts that are as good
    as the best, the one with most sequences is taken. So it is where all layers are resident anyway: no
    other use would be made of the memory, and the speed of a machine may be more than was measured.
    """
    most = min(problem.most_sequences(layout), problem.wanted(layout))
    least = min(most, problem.min_sequences)
    steps = sorted({max(least, 1, most * i // PAGE_STEPS) for i in range(1, PAGE_STEPS + 1)})
    tried = (with_cache(problem, layout, problem.cache(sequences)) for sequences in steps)
    found = [candidate for candidate in tried if candidate is not None]
    assert found, "the least memory was checked to fit"
    found += _with_guests(problem, layout)
    found = [one for one in found if one.cache.in_all >= problem.min_sequences] or found
    rates = [candidate.prediction.tokens_per_second for candidate in found]
    good = [one for one, rate in zip(found, rates, strict=True) if rate * WORTH_IT >= max(rates)]
    if layout.split:
        return good[-1]
    best = 0
    for i, rate in enumerate(rates):
        if rate > rates[best] * WORTH_IT:
            best = i
    resident = [one for one in good if not one.cache.guests and not any(one.filling.ring_slots)]
    return resident[-1] if found[best] in resident else found[best]


def as_stored(problem: Problem, candidate: Candidate) -> Candidate | None:
    """The same with so few sequences that GPUs multiply 4-bit weights as they are stored: the formula,
    which is a bound, does not know what dequantizing costs. None where there are no more anyway, or where
    more are asked for."""
    layout = candidate.layout
    most = FUSED_ROWS * layout.micro_batches * layout.passes_in_flight
    if candidate.cache.guests or not problem.min_sequences <= most < candidate.cache.in_all:
        return None
    return with_cache(problem, layout, problem.cache(most))


def _with_guests(problem: Problem, layout: Layout) -> list[Candidate]:
    """Sequences beyond those that the device holds, with their pages in host RAM, or the older ones on
    NVMe: fewest first."""
    wanted = problem.wanted(layout)
    in_host, in_all = (min(most, wanted - 1) for most in problem.most_guests(layout))
    if in_all < 1:
        return []
    counts = {in_host * i // GUEST_STEPS for i in range(1, GUEST_STEPS + 1)}
    # A drive is soon busy, and nothing is gained from there on: few more are tried most closely.
    counts |= {in_host + (in_all - in_host) // 2**i for i in range(GUEST_STEPS)}
    counts.add(_guests_asked_for(problem, layout, in_all))
    found = []
    for guests in sorted(count for count in counts if count > 0):
        room = problem.hosting(layout, guests)
        if room is None:
            break
        beside = min(problem.most_sequences(layout, room), wanted - guests)
        for share in DEVICE_SHARES:
            if beside // share > 0:
                cache = replace(room, sequences=beside // share)
                found.append(with_cache(problem, layout, cache))
    whole = [candidate for candidate in found if candidate is not None]
    return sorted(whole, key=lambda candidate: candidate.cache.in_all)


def _guests_asked_for(problem: Problem, layout: Layout, most: int) -> int:
    """The fewest guests with whom there is room for all sequences that shall have some, or `most`."""
    low, high = 1, most
    while low < high:
        guests = (low + high) // 2
        room = problem.hosting(layout, guests)
        if room is None or guests + problem.most_sequences(layout, room) >= problem.min_sequences:
            high = guests
        else:
            low = guests + 1
    return low


def with_cache(problem: Problem, layout: Layout, cache: Cache) -> Candidate | None:
    """The layout with room for just these sequences; None where that does not fit."""
    filling = fill(problem.shape, layout, problem.budgets, cache)
    if filling is None:
        return None
    decode = Decode.of(layout, cache, problem.context)
    prediction = predict(
        problem.shape, problem.profiles, filling.placement, decode, filling.pools, problem.links
    )
    return Candidate(layout, filling, cache, prediction)
