"""The few layouts that a plan is chosen from, simplest first."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from headrace.scheduler.inputs import Choices, Kind
from headrace.scheduler.memory import Layout
from headrace.scheduler.placement import (
    Visit,
    contiguous_blocks,
    contiguous_visits,
    cyclic_turns,
    cyclic_visits,
)

TOKEN_BUDGET = {"cuda": 8192, "cpu": 512}
"""Tokens a pass: enough to keep the matmuls of a pass busy while weights stream. Where it leaves streaming
longer than computing, it is raised afterwards (headrace.scheduler.prompt_room)."""

GRAPH_ROWS = 512
"""Micro-batches of more decodes keep a GPU busy for longer than launching their kernels takes."""

GRAPH_LANES = 16
"""Lanes of CUDA graphs for each micro-batch of a pass: for so many sizes."""

LEAST_TOKEN_BUDGET = 64

CYCLIC_VISITS = (1, 2, 4)
"""Layers a visit, where visits alternate between stages; larger ones make fewer hops."""

RING_VISITS = (2, 3, 4)
"""Visits that a ring holds: one computes while others load. More even out loads of unlike tiers, keep
the link busy while a pass is turned round, and ride out jitter, which no model knows."""


def resident_layouts(
    num_layers: int, num_stages: int, kind: Kind, choices: Choices
) -> Iterator[Layout]:
    """Blocks of layers with one pass in flight a stage (or a ring of visits, where asked for).

    None when a stage shall keep fewer layers than it has.
    """
    largest = max(choices.stage_layers or (-(-num_layers // num_stages),))
    if choices.resident_layers is not None and choices.resident_layers < largest:
        return iter(())
    if choices.placement == "cyclic":
        visits = _visits(num_layers, num_stages, 1, True, choices)
        return _cut(visits, num_stages, 0, 1, num_stages, kind, choices)
    visits = _visits(num_layers, num_stages, num_layers, False, choices)
    return _cut(visits, num_stages, 0, num_stages, 1, kind, choices)


def streaming_layouts(
    num_layers: int, num_stages: int, kind: Kind, choices: Choices, *, split: bool = False
) -> Iterator[Iterator[Layout]]:
    """Families of layouts that differ only in their token budget, largest first; cyclic ones first."""
    families = _split_families if split else _families
    if num_stages > 1 and choices.placement != "contiguous":
        yield from families(num_layers, num_stages, True, kind, choices)
    if num_stages == 1 or choices.placement != "cyclic":
        yield from families(num_layers, num_stages, False, kind, choices)


def _split_families(
    num_layers: int, num_stages: int, cyclic: bool, kind: Kind, choices: Choices
) -> Iterator[Iterator[Layout]]:
    """Layouts whose experts are apart from their layers, also with a single micro-batch: it lets go
    of each expert at once and so needs the fewest slots."""
    given = [choices]
    if cyclic and choices.micro_batches is None:
        given.insert(0, replace(choices, micro_batches=1))
    for some in given:
        for family in _families(num_layers, num_stages, cyclic, kind, some):
            yield (replace(layout, split=True) for layout in family)


def _families(
    num_layers: int, num_stages: int, cyclic: bool, kind: Kind, choices: Choices
) -> Iterator[Iterator[Layout]]:
    convoys = num_stages if cyclic else 1
    # More micro-batches take less memory and hide the hops of the first, but each has the weights
    # dequantized again.
    counts = (
        (choices.micro_batches,) if choices.micro_batches else (convoys, 2 * convoys, 4 * convoys)
    )
    cut = partial(_cut, num_stages=num_stages, kind=kind, choices=choices)
    for layers_a_visit in _visit_sizes(num_layers, num_stages, cyclic):
        visits = _visits(num_layers, num_stages, layers_a_visit, cyclic, choices)
        for held, micro_batches in product(RING_VISITS, counts):
            yield cut(
                visits,
                ring_slots=held * layers_a_visit,
                passes=1 if cyclic else num_stages,
                micro_batches=micro_batches,
            )


def _visits(
    num_layers: int, num_stages: int, layers_a_visit: int, cyclic: bool, choices: Choices
) -> tuple[Visit, ...]:
    """Stages have as many layers as each other, or those that were chosen for them."""
    layers = choices.stage_layers
    if layers is None:
        make_visits = cyclic_visits if cyclic else contiguous_visits
        return make_visits(num_layers, num_stages, layers_a_visit)
    if not cyclic:
        return contiguous_blocks(layers, layers_a_visit)
    turns = _turns(layers, -(-num_layers // layers_a_visit))
    return cyclic_turns(turns, num_layers, layers_a_visit)


def modest_choices(
    num_layers: int, device_memory: Sequence[int], choices: Choices
) -> Iterator[Choices]:
    """The choices with splits that take the least memory where it is short: next to nothing beside the
    head, or on every stage but the largest. None where a split was chosen.

    Of contiguous layouts, unless others were asked for: those take no more memory.
    """
    stages = len(device_memory)
    if choices.stage_layers is None and 1 < stages < num_layers:
        cyclic = choices.placement == "cyclic"
        last = (num_layers - 1) % stages if cyclic else stages - 1
        placement = "cyclic" if cyclic else "contiguous"
        for layers in _modest_splits(num_layers, device_memory, last):
            yield replace(choices, stage_layers=layers, placement=placement)


def _modest_splits(
    num_layers: int, device_memory: Sequence[int], last: int
) -> list[tuple[int, ...]]:
    stages = len(device_memory)
    share, more = divmod(num_layers - 1, stages - 1)
    others = [share + (i < more) for i in range(stages - 1)]
    largest = device_memory.index(max(device_memory))
    most = [1] * stages
    most[largest] = num_layers - stages + 1
    return [(*others[:last], 1, *others[last:]), tuple(most)]


def _turns(layers: Sequence[int], visits: int) -> list[int]:
    """Each stage's share of the visits by its share of layers: one at least, by largest remainders."""
    total, stages = sum(layers), range(len(layers))
    turns = [max(1, own * visits // total) for own in layers]
    while sum(turns) != visits:
        step = 1 if sum(turns) < visits else -1
        able = [s for s in stages if turns[s] + step >= 1]
        stage = max(able, key=lambda s: step * (layers[s] * visits / total - turns[s]))
        turns[stage] += step
    return turns


def _visit_sizes(num_layers: int, num_stages: int, cyclic: bool) -> tuple[int, ...]:
    if not cyclic:
        return (1,)
    # Every stage has at least one visit.
    return tuple(n for n in CYCLIC_VISITS if -(-num_layers // n) >= num_stages)


def _cut(
    visits: tuple[Visit, ...],
    num_stages: int,
    ring_slots: int,
    passes: int,
    micro_batches: int,
    kind: Kind,
    choices: Choices,
) -> Iterator[Layout]:
    layers = tuple(
        tuple(i for visit in visits if visit.stage == stage for i in visit.layers)
        for stage in range(num_stages)
    )
    for token_budget in _token_budgets(kind, micro_batches, choices):
        batches = choices.micro_batches or min(micro_batches, token_budget)
        layout = Layout(
            visits, layers, ring_slots, token_budget, batches, passes, choices.resident_layers
        )
        # Those that were asked for are never left out.
        yield with_graphs(layout, kind, choices, 1) if choices.graphs else layout


def with_graphs(layout: Layout, kind: Kind, choices: Choices, lanes: int = GRAPH_LANES) -> Layout:
    """The layout with `lanes` of CUDA graphs for each micro-batch; as it is where none can be made."""
    if kind != "cuda" or choices.graphs is False:
        return layout
    return replace(
        layout,
        graph_rows=min(GRAPH_ROWS, layout.micro_batch_tokens),
        graph_lanes=lanes * layout.micro_batches,
    )


def _token_budgets(kind: Kind, micro_batches: int, choices: Choices) -> Iterator[int]:
    tokens = choices.token_budget or max(TOKEN_BUDGET[kind], micro_batches)
    yield tokens
    while not choices.token_budget and tokens // 2 >= max(LEAST_TOKEN_BUDGET, micro_batches):
        tokens //= 2
        yield tokens
