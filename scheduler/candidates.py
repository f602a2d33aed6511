"""The plans that are compared: every layout with its best page count, split evenly and not."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from headrace.scheduler.balance import splits
from headrace.scheduler.layouts import modest_choices, resident_layouts, streaming_layouts
from headrace.scheduler.memory import Cache, Layout
from headrace.scheduler.problem import Problem
from headrace.scheduler.search import Candidate, as_stored, search_pages


def resident_candidates(problem: Problem, enough: int) -> list[Candidate]:
    """Everything resident, wherever that leaves KV for `enough` sequences (or all that are wanted)."""
    alike = list(_resident_layouts(problem))
    if not alike:
        return []
    # Its activations leave what an even split of it would have for layers; or the most modest one's.
    like, caches = _roomiest(problem, iter(alike)), []
    if like is not None:
        caches = [search_pages(problem, like).cache]
    found = []
    for split in (problem, *_even(problem), *_uneven(problem, like or alike[-1], caches)):
        layout = _roomiest(split, _resident_layouts(split))
        if layout and split.most_sequences(layout) >= min(enough, split.wanted(layout)):
            chosen = search_pages(split, layout)
            found += [one for one in (chosen, as_stored(split, chosen)) if one is not None]
    return found


def streaming_candidates(problem: Problem) -> list[Candidate]:
    """Every layout with an even split, and those like the best cyclic and the best contiguous one with
    uneven splits."""
    found = _streaming(problem, _families(problem))
    for like, caches in _examples(problem, found):
        for split in _uneven(problem, like, caches):
            found += _streaming(split, _like(_families(split), like))
    return found or _modest(problem)


def _modest(problem: Problem) -> list[Candidate]:
    """What a refusal would have to name otherwise."""
    memory = [budget.device_memory for budget in problem.budgets]
    found = []
    for choices in modest_choices(problem.shape.num_layers, memory, problem.choices):
        split = replace(problem, choices=choices)
        found += _streaming(split, _families(split))
    return found


def _resident_layouts(problem: Problem) -> Iterator[Layout]:
    kind = problem.profiles[0].kind
    return resident_layouts(problem.shape.num_layers, len(problem.budgets), kind, problem.choices)


def _families(problem: Problem) -> Iterator[Iterator[Layout]]:
    shape, kind = problem.shape, problem.profiles[0].kind
    stages = len(problem.budgets)
    return streaming_layouts(shape.num_layers, stages, kind, problem.choices, split=shape.can_split)


def _streaming(problem: Problem, families: Iterable[Iterator[Layout]]) -> list[Candidate]:
    layouts = (_roomiest(problem, family) for family in families)
    return [search_pages(problem, layout) for layout in layouts if layout]


def _even(problem: Problem) -> Iterator[Problem]:
    """The problem with the last stages, which has the head to hold, no larger than the first ones."""
    layers, stages = problem.shape.num_layers, len(problem.budgets)
    if layers % stages and problem.choices.stage_layers is None:
        share, more = divmod(layers, stages)
        split = tuple(share + (stage < more) for stage in range(stages))
        yield replace(problem, choices=replace(problem.choices, stage_layers=split))


def _uneven(problem: Problem, like: Layout, caches: Sequence[Cache] = ()) -> Iterator[Problem]:
    """The problem with splits chosen that may be faster than an even one."""
    if len(problem.budgets) == 1 or problem.choices.stage_layers is not None:
        return
    for layers in splits(problem, like, caches):
        yield replace(problem, choices=replace(problem.choices, stage_layers=layers))


def _examples(
    problem: Problem, found: Sequence[Candidate]
) -> Iterator[tuple[Layout, Sequence[Cache]]]:
    """Of each kind the best layout by the formula, or where none fits the most modest one."""
    if len(problem.budgets) == 1:
        return
    for passes in (1, len(problem.budgets)):
        own = [one for one in found if one.layout.passes_in_flight == passes]
        if own:
            best = max(own, key=lambda one: one.prediction.tokens_per_second)
            yield best.layout, [best.cache]
            continue
        of_kind = [
            layout
            for family in _families(problem)
            for layout in family
            if layout.passes_in_flight == passes
        ]
        if of_kind:
            yield min(of_kind, key=lambda layout: (layout.token_budget, layout.ring_slots)), []


def _like(families: Iterable[Iterator[Layout]], like: Layout) -> Iterator[Iterator[Layout]]:
    """Families whose layouts differ from `like` in their ring and their token budget only."""
    for family in families:
        first = next(family, None)
        if first is not None and _kind(first) == _kind(like):
            yield chain((first,), family)


def _kind(layout: Layout) -> tuple[int, int, int]:
    return layout.passes_in_flight, len(layout.visits[0].layers), layout.micro_batches


def _roomiest(problem: Problem, layouts: Iterator[Layout]) -> Layout | None:
    """Of layouts with ever fewer tokens a pass, the first comfortable one or the last that fits.

    CUDA graphs that nobody asked for are left out where they do not fit, too.
    """
    fitting = []
    for layout in layouts:
        graphed = problem.graphed(layout)
        if problem.fits(graphed):
            fitting.append(graphed)
        elif problem.fits(layout):
            fitting.append(layout)
    roomy = (layout for layout in fitting if problem.is_roomy(layout))
    return next(roomy, fitting[-1] if fitting else None)
