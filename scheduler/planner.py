"""From sizes, speeds and budgets to a Plan, or to a refusal that says what would fit.

Memory goes first to what a run cannot do without (head, ring, scratch, activations), then to KV
pages, then to resident layers, then to experts of split ones; host RAM goes to KV
pages if it is given to them, else to pinned layers and experts. Layers are split where they are streamed and their experts can be read alone. How far pages
go before layers is searched, and how many sequences beyond those that the device holds have theirs in
host RAM and brought for each token: a few page counts for each of a few layouts are filled and predicted by
the formula, and the best of each layout is simulated. The token budget of the best is raised as far as streaming hides
what is computed. What goes in is described in
headrace.scheduler.inputs.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from headrace.scheduler.candidates import resident_candidates, streaming_candidates
from headrace.scheduler.config import DraftLimits
from headrace.scheduler.decode import Decode
from headrace.scheduler.draft_room import draft_limits
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.expectation import round_seconds
from headrace.scheduler.inputs import (
    DEFAULT_CONTEXT,
    PLACEMENTS,
    Budget,
    Choices,
    DeviceProfile,
    ModelShape,
    Workload,
)
from headrace.scheduler.kv_room import check_room, kv_costs, nvme_pages
from headrace.scheduler.links import Links
from headrace.scheduler.placement import Plan, Prediction, StageMemory, Tier, is_even
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.problem import Problem
from headrace.scheduler.prompt_room import full_pass, widened
from headrace.scheduler.refusal import refusal
from headrace.scheduler.search import WORTH_IT, Candidate
from headrace.scheduler.sizes import format_size
from headrace.scheduler.timing import passes_ahead

__all__ = ["Budget", "Choices", "DeviceProfile", "ModelShape", "Workload", "make_plan"]

ENOUGH_SEQUENCES = 16
"""With KV for this many sequences beside an even split of the whole model, nothing is streamed."""


def make_plan(
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    budgets: Sequence[Budget],
    workload: Workload,
    choices: Choices | None = None,
    links: Links | None = None,
) -> Plan:
    """The fastest plan found that keeps every budget. One profile and one budget for each stage, which
    reach each other as `links` say, or as their profiles do.

    Raises DoesNotFitError with a table of who needs how much on the tightest stage and what would
    make it fit, or when a choice is impossible (more stages than layers).
    """
    assert len(profiles) == len(budgets) > 0
    problem = Problem(
        shape,
        tuple(profiles),
        tuple(budgets),
        min(workload.context or DEFAULT_CONTEXT, shape.max_context),
        workload.max_sequences,
        workload.min_sequences,
        choices or Choices(),
        links or Links.of(profiles),
    )
    _check(problem, workload)
    candidates = resident_candidates(problem, ENOUGH_SEQUENCES)
    if not any(is_even(one.layout.visits, one.layout.num_stages) for one in candidates):
        candidates = candidates or resident_candidates(problem, 1)
        candidates += streaming_candidates(problem)
    enough = [one for one in candidates if one.cache.in_all >= problem.min_sequences]
    candidates = enough or candidates
    best = _fastest(problem, candidates)
    if best is None:
        raise DoesNotFitError(
            refusal(shape, problem.profiles[0].kind, budgets, problem.context, problem.choices)
        )
    best = widened(problem, best, partial(_simulated_seconds, problem))
    check_room(shape, best.layout, budgets, best.filling.host_pages)
    return _plan(problem, best)


def _check(problem: Problem, workload: Workload) -> None:
    choices = problem.choices
    if choices.placement not in PLACEMENTS:
        raise DoesNotFitError(f"--placement {choices.placement} is none of {', '.join(PLACEMENTS)}")
    for name, value in (
        ("--token-budget", choices.token_budget),
        ("--max-sequences", choices.max_sequences),
        ("--micro-batches", choices.micro_batches),
        ("--context", workload.context),
        ("the number of sequences", workload.max_sequences),
    ):
        if value is not None and value < 1:
            raise DoesNotFitError(f"{name} must be at least 1, not {value}")
    if choices.resident_layers is not None and choices.resident_layers < 0:
        raise DoesNotFitError(
            f"--resident-layers must be at least 0, not {choices.resident_layers}"
        )
    if choices.kv_hot_window is not None and choices.kv_hot_window < 0:
        raise DoesNotFitError(f"--kv-hot-window must be at least 0, not {choices.kv_hot_window}")
    if choices.token_budget and (choices.micro_batches or 1) > choices.token_budget:
        raise DoesNotFitError(
            f"--micro-batches {choices.micro_batches} cannot share --token-budget"
            f" {choices.token_budget}: give at least one token to each"
        )
    for stage, budget in enumerate(problem.budgets):
        needed = budget.kv_host_memory + budget.kv_log
        if not 0 <= budget.kv_host_memory <= needed <= budget.host_memory:
            size = format_size(budget.kv_host_memory, up=True)
            log = f" (and {format_size(budget.kv_log)} for --kv-directory)" if budget.kv_log else ""
            raise DoesNotFitError(
                f"--kv-host-memory {size}{log} is not within the {format_size(budget.host_memory)} of"
                f" host memory that stage {stage} has: raise --host-memory to at least"
                f" {format_size(needed, up=True)}, or lower --kv-host-memory"
            )
    stages, layers = len(problem.budgets), problem.shape.num_layers
    if stages > layers:
        raise DoesNotFitError(
            f"--stages {stages} cannot share {layers} layers: use --stages {layers} or fewer"
        )
    given = choices.stage_layers
    if given is not None and (len(given) != stages or min(given) < 1 or sum(given) != layers):
        raise DoesNotFitError(
            f"layers of each stage, {', '.join(map(str, given))}, must be {stages} numbers that are at"
            f" least 1 and {layers} in all"
        )


def _fastest(problem: Problem, candidates: Sequence[Candidate]) -> Candidate | None:
    """By simulation the fastest; of those as good as it, an even split, then the simplest (whole layers,
    or split ones whose experts need not wait for another micro-batch), then the one with the most tokens
    a pass, then the one with the deepest ring.

    Tokens beyond the decoding sequences are prefill that rides along. Candidates that keep everything
    resident are simplest of all.
    """
    rates = [_simulated_rate(problem, candidate) for candidate in candidates]
    good = [
        candidate
        for candidate, rate in zip(candidates, rates, strict=True)
        if rate * WORTH_IT >= max(rates)
    ]
    return max(good, key=_spare, default=None)


def _spare(candidate: Candidate) -> tuple[bool, bool, bool, int, int]:
    layout = candidate.layout
    widest = len(layout.visits[0].layers)
    lets_go = layout.split and layout.micro_batches == 1
    return (
        is_even(layout.visits, layout.num_stages),
        not layout.split,
        lets_go,
        layout.token_budget,
        layout.ring_slots // widest,
    )


def _simulated_rate(problem: Problem, candidate: Candidate) -> float:
    decode = Decode.of(candidate.layout, candidate.cache, problem.context)
    return decode.sequences / _simulated_seconds(problem, candidate, decode)


def _simulated_seconds(problem: Problem, candidate: Candidate, decode: Decode) -> float:
    """Of a round of passes."""
    filling = candidate.filling
    return round_seconds(
        problem.shape,
        problem.profiles,
        problem.links,
        filling.placement,
        decode,
        ring_slots=filling.ring_slots,
        ahead=passes_ahead(candidate.prediction),
        pools=filling.pools,
    )


def _drafts(problem: Problem, candidate: Candidate) -> DraftLimits:
    return draft_limits(
        problem.shape,
        candidate.prediction,
        Decode.of(candidate.layout, candidate.cache, problem.context),
        candidate.layout.token_budget,
        split=candidate.filling.pools is not None,
        asked=problem.choices.drafts,
        seconds=partial(_simulated_seconds, problem, candidate),
    )


def _expected(problem: Problem, candidate: Candidate) -> Prediction:
    """The candidate's prediction with what simulations of it take."""
    decode = Decode.of(candidate.layout, candidate.cache, problem.context)
    expected = _simulated_seconds(problem, candidate, decode)
    prediction = replace(candidate.prediction, expected_seconds=expected)
    if not any(candidate.filling.ring_slots):
        return prediction
    full = full_pass(problem, candidate)
    seconds = _simulated_seconds(problem, candidate, full)
    return replace(prediction, prompt_tokens=full.prompt_tokens, prompt_seconds=seconds)


def _plan(problem: Problem, candidate: Candidate) -> Plan:
    layout, filling, pools = candidate.layout, candidate.filling, candidate.filling.pools
    shape, cache = problem.shape, candidate.cache
    held = shape.held_bytes(split=layout.split)
    sequences = -(-candidate.prediction.sequences // layout.passes_in_flight)
    nvme, host = (
        tuple(
            sum(held[i] for i in layers if filling.placement.tiers[i] is tier)
            for layers in layout.layers
        )
        for tier in (Tier.NVME, Tier.HOST)
    )
    assert all(
        _keeps(memory, budget)
        for memory, budget in zip(filling.memory, problem.budgets, strict=True)
    )
    return Plan(
        placement=filling.placement,
        slot_bytes=filling.slot_bytes,
        ring_slots=filling.ring_slots,
        num_pages=cache.num_pages,
        max_context=min(shape.max_context, cache.num_pages * PAGE_TOKENS),
        token_budget=layout.token_budget,
        max_sequences=problem.choices.max_sequences or sequences,
        micro_batches=layout.micro_batches,
        micro_batch_tokens=layout.micro_batch_tokens,
        logit_rows=layout.logit_rows,
        sample_rows=layout.sample_rows,
        graph_rows=layout.graph_rows,
        graph_lanes=layout.graph_lanes,
        passes_in_flight=layout.passes_in_flight,
        ahead=passes_ahead(candidate.prediction),
        memory=filling.memory,
        nvme_bytes_a_pass=nvme,
        host_bytes_a_pass=host,
        prediction=_expected(problem, candidate),
        expert_slot_bytes=pools.slot_bytes if pools else 0,
        expert_slots=pools.device if pools else (),
        host_experts=pools.host if pools else (),
        kv_format=shape.kv_format,
        num_tails=cache.in_all if shape.layer_tail_bytes else 0,
        host_pages=filling.host_pages,
        nvme_pages=nvme_pages(shape, layout, problem.budgets, cache.window_pages),
        kv_costs=kv_costs(shape, layout, problem.profiles, candidate.prediction),
        kv_ring_pages=cache.ring_pages,
        cold_micro_batches=cache.cold_batches,
        window_pages=cache.window_pages,
        hot_window=(problem.choices.kv_hot_window or 0) if cache.window_pages else 0,
        drafts=_drafts(problem, candidate),
        adapter_slots=problem.choices.adapter_slots,
        adapter_rank=problem.choices.adapter_rank,
    )


def _keeps(memory: StageMemory, budget: Budget) -> bool:
    return memory.device <= budget.device_memory and memory.host <= budget.host_memory
