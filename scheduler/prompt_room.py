"""How many tokens of prompts ride a pass for nothing, by the planner's own model of it."""

from collections.abc import Callable
from dataclasses import replace

from headrace.scheduler.decode import Decode
from headrace.scheduler.memory import Layout
from headrace.scheduler.problem import Problem
from headrace.scheduler.search import WORTH_IT, Candidate, with_cache

FREE = 1.02
"""A full pass may take so many times what it takes with the tokens that it has anyway."""

STEADY = 1.001
"""And one of decodes alone: more micro-batches have a ring wait a little longer at a pass's end."""

LEAST_SHARE = 4
"""A budget is raised by at least one part in so many."""

PARTS = (2, 4, 8)
"""What is doubled as often as that is free is raised by these of its parts besides."""

Seconds = Callable[[Candidate, Decode], float]


def full_pass(problem: Problem, candidate: Candidate) -> Decode:
    """A round of passes in which prompts take all tokens that decodes leave."""
    layout = candidate.layout
    decode = Decode.of(layout, candidate.cache, problem.context)
    prompts = max(0, layout.token_budget * layout.passes_in_flight - decode.sequences)
    batches = layout.micro_batches + decode.cold_batches
    return replace(decode, micro_batches=batches, prompt_tokens=prompts)


def widened(problem: Problem, candidate: Candidate, seconds: Seconds) -> Candidate:
    """The candidate with the token budget raised to where computing a full pass meets its loads; as it is
    where the user gave a budget, or where that is not to be had for nothing.

    Sequences are as many, or so few less that decoding is as fast; no pass takes longer for it.
    `seconds` of a round of passes.
    """
    if problem.choices.token_budget or candidate.prediction.bound_by not in ("nvme", "pcie"):
        return candidate
    tokens = candidate.layout.token_budget
    found = _with_budget(problem, candidate, tokens + tokens // LEAST_SHARE)
    if found is None:
        return candidate
    is_as_good = _as_good_as(problem, candidate, seconds)
    if not is_as_good(found):  # nor is a larger one
        return candidate

    def attempt(tokens: int) -> Candidate | None:
        wider = _with_budget(problem, candidate, tokens)
        return wider if wider is not None and is_as_good(wider) else None

    while wider := attempt(2 * tokens):
        found, tokens = wider, 2 * tokens
    doubled = tokens
    for part in PARTS:
        if wider := attempt(tokens + doubled // part):
            found, tokens = wider, tokens + doubled // part
    return found


def _as_good_as(
    problem: Problem, candidate: Candidate, seconds: Seconds
) -> Callable[[Candidate], bool]:
    decode = Decode.of(candidate.layout, candidate.cache, problem.context)
    took = seconds(candidate, decode)
    full = FREE * seconds(candidate, full_pass(problem, candidate))

    def is_as_good(wider: Candidate) -> bool:
        if seconds(wider, full_pass(problem, wider)) > full:
            return False
        own = Decode.of(wider.layout, wider.cache, problem.context)
        takes = seconds(wider, own)
        is_as_fast = own.sequences * took * WORTH_IT >= decode.sequences * takes
        return takes <= STEADY * took and is_as_fast

    return is_as_good


def _with_budget(problem: Problem, candidate: Candidate, tokens: int) -> Candidate | None:
    """The candidate with another budget, every layer where it was, and what sequences fit beside it; None
    where it takes too much memory, or where prompts of all sequences would not fill it."""
    before = candidate.cache
    layout = _wider(problem, candidate, tokens)
    if not problem.is_roomy(layout):
        return None
    none = replace(before, sequences=0)
    most, least = (problem.most_sequences(one, none) for one in (candidate.layout, layout))
    for fewer in (0, most - least, most - least + 1):
        cache = replace(before, sequences=before.sequences - fewer)
        # A slice is no longer than a micro-batch.
        usable = _a_pass(layout, cache.in_all) * min(problem.context, layout.micro_batch_tokens)
        too_few = cache.in_all < min(problem.min_sequences, before.in_all)
        if cache.sequences < 1 or too_few or tokens > usable:
            return None
        wider = with_cache(problem, layout, cache)
        if wider is not None and wider.filling.placement == candidate.filling.placement:
            return wider
    return None


def _wider(problem: Problem, candidate: Candidate, tokens: int) -> Layout:
    """More micro-batches of the same size, which only have more hidden states wait between visits; larger
    ones where there are no sequences to fill more, where just as many were asked for, or where each
    holds experts for the next."""
    layout = candidate.layout
    batches = layout.micro_batches
    if problem.choices.micro_batches is None and not layout.split:
        most = _a_pass(layout, candidate.cache.in_all)
        batches = max(batches, min(most, tokens // layout.micro_batch_tokens))
    return replace(layout, token_budget=tokens, micro_batches=batches)


def _a_pass(layout: Layout, sequences: int) -> int:
    return -(-sequences // layout.passes_in_flight)
