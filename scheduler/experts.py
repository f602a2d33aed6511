"""Mixtures whose layers are split: how many experts tokens reach, and which of them are loaded.

All of it supposes that tokens choose experts evenly and independently of each other. Real routers
have favourites, so that fewer experts are reached and more of those are at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from headrace.scheduler.inputs import Experts, ModelShape
from headrace.scheduler.placement import Placement, Visit

FEW_SLOTS = 8
"""Experts under way at once where none has to stay for another micro-batch."""

ALMOST_ALL = 0.85
"""Where tokens reach this share of a layer's experts, they are loaded ahead of the router."""


@dataclass(frozen=True, slots=True)
class ExpertPools:
    """Room for experts of `slot_bytes` each: how many on each stage's device and in its host RAM."""

    slot_bytes: int
    device: tuple[int, ...]
    host: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loads:
    """One layer's experts in a pass: how many tokens reach, how many have to be loaded from where,
    in bytes, and which share of them is loaded ahead of the router rather than once it has chosen."""

    reached: float
    loaded: float
    nvme_bytes: float
    host_bytes: float
    ahead: float


def reached(experts: Experts, rows: float) -> float:
    """Expected distinct experts of a layer that `rows` tokens reach: E (1 - (1 - k/E)^rows)."""
    left = 1.0 - experts.per_token / experts.count
    return experts.count * float(1.0 - left**rows)


def num_experts(shape: ModelShape, layers: Sequence[int]) -> int:
    """How many experts can be read alone in all of `layers`."""
    found = (shape.experts_of(layer) for layer in layers)
    return sum(experts.count for experts in found if experts)


def layers_at_once(shape: ModelShape, visits: Sequence[Visit], stage: int) -> int:
    """Most experts of any visit of the stage."""
    return max(num_experts(shape, visit.layers) for visit in visits if visit.stage == stage)


def transit_slots(
    shape: ModelShape, visits: Sequence[Visit], stage: int, micro_batches: int
) -> int:
    """Slots that experts on their way need, so that none is loaded twice in a pass.

    What one micro-batch has loaded has to stay until the visit's last one has been there.
    """
    a_visit = layers_at_once(shape, visits, stage)
    return a_visit if micro_batches > 1 else min(a_visit, FEW_SLOTS)


def layer_loads(
    shape: ModelShape, placement: Placement, pools: ExpertPools, micro_batches: int, rows: float
) -> dict[int, Loads]:
    """Loads of each layer with experts, for `micro_batches` micro-batches of `rows` tokens.

    Slots that are not needed by experts on their way keep the most used ones, and host RAM the most
    used of the others. What is loaded ahead of a visit has to find slots.
    """
    found: dict[int, Loads] = {}
    for stage in range(placement.num_stages):
        layers = placement.layers_of(stage)
        total, slots = num_experts(shape, layers), pools.device[stage]
        if not total:
            continue
        transit = transit_slots(shape, placement.visits, stage, micro_batches)
        kept = total if slots >= total else max(0, slots - transit)
        missing = 1.0 - kept / total
        in_host = min(1.0, pools.host[stage] / max(1, total - kept))
        room = min(1.0, slots / layers_at_once(shape, placement.visits, stage))
        for layer in layers:
            experts = shape.experts_of(layer)
            if experts is not None:
                found[layer] = _loads(experts, micro_batches * rows, missing, in_host, room)
    return found


def _loads(experts: Experts, rows: float, missing: float, in_host: float, room: float) -> Loads:
    hit = reached(experts, rows)
    loaded = hit * missing
    nbytes = loaded * experts.expert_bytes
    ahead = room if hit >= ALMOST_ALL * experts.count else 0.0
    return Loads(hit, loaded, nbytes * (1.0 - in_host), nbytes * in_host, ahead)


def loads_ahead(
    shape: ModelShape,
    placement: Placement,
    pools: ExpertPools,
    ring_slots: Sequence[int],
    micro_batches: int,
) -> tuple[int, ...]:
    """Layers that each stage can hold or load at once when experts are loaded ahead of routers.

    Where a stage's visits follow each other, a single micro-batch frees slots for the next visit as
    it goes.
    """
    pairs = pairwise(placement.visits)
    follow = {one.stage for one, following in pairs if one.stage == following.stage}
    rolling = follow if micro_batches == 1 else set()
    return tuple(
        _ahead(shape, placement, stage, slots, ring, rolling=stage in rolling)
        for stage, (slots, ring) in enumerate(zip(pools.device, ring_slots, strict=True))
    )


def _ahead(
    shape: ModelShape, placement: Placement, stage: int, slots: int, ring: int, *, rolling: bool
) -> int:
    if not slots:
        return ring
    widest = max(len(placement.visits[v].layers) for v in placement.visits_of(stage))
    a_layer = max(num_experts(shape, (layer,)) for layer in placement.layers_of(stage))
    held = max(slots // a_layer, widest) + rolling
    return min(held, ring) if ring else held
