"""The refusal: who needs how much on the tightest stage, and what would make it fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headrace.scheduler.inputs import Budget, Choices, Experts, Kind, ModelShape
from headrace.scheduler.layouts import modest_choices, streaming_layouts
from headrace.scheduler.memory import Cache, Layout, least_memory
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import StageMemory
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.sizes import format_size

NF4_BITS = 4.5
"""Bits that a weight takes in NF4: four, and a float32 scale for 64 weights."""

ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class _Case:
    """What was asked for, or a variation of it."""

    shape: ModelShape
    kind: Kind
    budgets: tuple[Budget, ...]
    context: int
    choices: Choices

    def layouts(self) -> Iterator[Layout]:
        memory = [budget.device_memory for budget in self.budgets]
        modest = modest_choices(self.shape.num_layers, memory, self.choices)
        for choices in (self.choices, *modest):
            families = streaming_layouts(
                self.shape.num_layers,
                len(memory),
                self.kind,
                choices,
                split=self.shape.can_split,
            )
            for family in families:
                yield from family


@dataclass(frozen=True, slots=True)
class _Need:
    """The tightest stage of the most modest layout."""

    stage: int
    memory: StageMemory
    layout: Layout
    budget: int

    @property
    def excess(self) -> int:
        return self.memory.device - self.budget

    def outcome(self) -> str:
        size = format_size(self.memory.device, up=True)
        return f"needs {size}: " + ("fits" if self.excess <= 0 else "not enough alone")


def _need(case: _Case) -> _Need:
    cache = Cache(1, pages_for(case.context))

    def tightest(layout: Layout) -> _Need:
        needs = (
            _Need(
                stage,
                least_memory(case.shape, layout, stage, cache),
                layout,
                budget.device_memory,
            )
            for stage, budget in enumerate(case.budgets)
        )
        return max(needs, key=lambda need: need.excess)

    return min((tightest(layout) for layout in case.layouts()), key=lambda need: need.excess)


def refusal(
    shape: ModelShape,
    kind: Kind,
    budgets: Sequence[Budget],
    context: int,
    choices: Choices,
) -> str:
    """The message of a DoesNotFitError."""
    case = _Case(shape, kind, tuple(budgets), context, choices)
    need = _need(case)
    # Every stage gets the same option, so the largest stage decides what it has to be.
    roomy = replace(case, budgets=tuple(replace(b, device_memory=0) for b in budgets))
    least = format_size(_need(roomy).memory.device, up=True)
    ways = [f"--device-memory at least {least}: fits", *_ways(case)]
    return "\n".join(
        [
            (
                f"stage {need.stage} of {len(budgets)} needs at least"
                f" {format_size(need.memory.device, up=True)} of device memory and has"
                f" {format_size(need.budget)}:"
            ),
            *_table(case, need),
            "What would change that:",
            *(f"  - {way}" for way in ways),
        ]
    )


def _table(case: _Case, need: _Need) -> Iterator[str]:
    memory, layout = need.memory, need.layout
    rows = (
        ("head", memory.head, "final norm and LM head"),
        ("ring", memory.ring, f"{layout.ring_slots} slots for streamed layers"),
        ("layers", memory.resident, "fewer bytes than a ring"),
        ("experts", memory.experts, "slots for those that a pass loads"),
        ("scratch", memory.scratch, "one dequantized matrix"),
        ("activations", memory.activations, f"{layout.token_budget} tokens a pass"),
        ("adapters", memory.adapters, "slots: fewer with --adapter-slots, or --adapter-rank"),
        ("graphs", memory.graphs, "CUDA graphs of decodes"),
        ("KV pages", memory.kv, f"one sequence of {case.context} tokens"),
        ("KV tails", memory.tails, "its newest page, not quantized"),
        ("in all", memory.device, f"budget {format_size(need.budget)}"),
    )
    for name, size, what in rows:
        if size:
            yield f"  {name:<12}{format_size(size, up=True):>12}  {what}"


def _ways(case: _Case) -> Iterator[str]:
    yield from _more_stages(case)
    yield from _smaller_format(case)
    yield from _shorter_context(case)
    choices = case.choices
    for option, value, freed in (
        ("--token-budget", choices.token_budget, replace(choices, token_budget=None)),
        ("--micro-batches", choices.micro_batches, replace(choices, micro_batches=None)),
        ("--resident-layers", choices.resident_layers, replace(choices, resident_layers=None)),
    ):
        if value is not None:
            need = _need(replace(case, choices=freed))
            yield f"no {option} {value}, so that the planner takes less: {need.outcome()}"
    if choices.graphs:
        need = _need(replace(case, choices=replace(choices, graphs=False)))
        yield f"--no-graphs: {need.outcome()}"


def _more_stages(case: _Case) -> Iterator[str]:
    """The fewest stages that fit, looking up to four times as many."""
    stages = len(case.budgets)
    most = min(case.shape.num_layers, 4 * stages)
    smallest = min(case.budgets, key=lambda budget: budget.device_memory)
    need = None
    for more in range(stages + 1, most + 1):
        shared = replace(case.choices, stage_layers=None)
        need = _need(replace(case, budgets=(smallest,) * more, choices=shared))
        if need.excess <= 0:
            break
    if need is not None:
        yield f"--stages {need.layout.num_stages}: {need.outcome()}"


def _smaller_format(case: _Case) -> Iterator[str]:
    shape = case.shape
    sizes = tuple(
        -int(-parameters * NF4_BITS / 8 // ALIGNMENT) * ALIGNMENT
        for parameters in shape.layer_parameters
    )
    if max(sizes) < 0.9 * max(shape.layer_bytes):  # else it is in four bits already
        experts = tuple(map(_shrunk, shape.experts, shape.layer_bytes, sizes))
        smaller = replace(shape, layer_bytes=sizes, needs_scratch=True, experts=experts)
        need = _need(replace(case, shape=smaller))
        yield (
            f"a store in nf4 (about {format_size(max(sizes), up=True)} a layer instead of"
            f" {format_size(max(shape.layer_bytes))}): {need.outcome()}"
        )


def _shrunk(experts: Experts | None, whole: int, smaller: int) -> Experts | None:
    """The experts of a layer of `whole` bytes once it has `smaller`."""
    if experts is None:
        return None

    def shrink(nbytes: int) -> int:
        return -(-nbytes * smaller // (whole * ALIGNMENT)) * ALIGNMENT

    return replace(
        experts,
        dense_bytes=shrink(experts.dense_bytes),
        expert_bytes=shrink(experts.expert_bytes),
    )


def _shorter_context(case: _Case) -> Iterator[str]:
    """The longest of the halved contexts that fits, or the shortest."""
    context, need = case.context, None
    while context > PAGE_TOKENS and (need is None or need.excess > 0):
        context = max(PAGE_TOKENS, context // 2)
        need = _need(replace(case, context=context))
    if need is not None:
        yield f"--context {context}: {need.outcome()}"
