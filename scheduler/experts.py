"""Mixtures whose layers are split: how many experts tokens reach, and which of them are loaded.

All of it supposes that tokens choose experts evenly and independently of each other, so that all of
a layer's are likely to be reached or none. Real routers have favourites: fewer experts are reached, and
more of those are at hand or loaded ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.scheduler.inputs import Experts, ModelShape
from headrace.scheduler.placement import Placement, Visit

FEW_SLOTS = 8
"""Experts under way at once where none has to stay for another micro-batch."""

MAX_PASSING, PASSING_BYTES = 32, 1 << 30
"""Slots for what passes, and bytes of them; more than keep a drive and a link busy had better keep
something."""

RECENT, LIKELY = 8, 7
"""An expert that at least LIKELY of the RECENT last passes reached is loaded before its layer's router
has spoken. What was reached says more than what so many tokens should reach."""

LOOK_AHEAD = 4
"""Layers whose likely experts are loaded ahead, as far as slots go."""


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


def passing_slots(slots: int, slot_bytes: int, held: int = 0) -> int:
    """How many of a stage's slots are for what is on its way and not worth keeping.

    `held` experts of a visit stay for its next micro-batch.
    """
    enough = min(slots // 4, MAX_PASSING, PASSING_BYTES // slot_bytes)
    return min(slots, max(4, held, enough))


def slots_ahead(passing: int) -> int:
    """How many of those are for what no router has asked for yet, at most: what one does ask for and
    nobody foresaw always finds slots, and has few loads before it."""
    return passing // 2


def layer_loads(
    shape: ModelShape, placement: Placement, pools: ExpertPools, micro_batches: int, rows: float
) -> dict[int, Loads]:
    """Loads of each layer with experts, for `micro_batches` micro-batches of `rows` tokens.

    Slots that are not for experts on their way keep the most used ones, and host RAM the most used
    of the others.
    """
    found: dict[int, Loads] = {}
    for stage in range(placement.num_stages):
        layers = placement.layers_of(stage)
        total, slots = num_experts(shape, layers), pools.device[stage]
        if not total:
            continue
        passing = _passing(shape, placement, stage, pools, micro_batches)
        kept = total if slots >= total else slots - passing
        missing = 1.0 - kept / total
        in_host = min(1.0, pools.host[stage] / max(1, total - kept))
        for layer in layers:
            experts = shape.experts_of(layer)
            if experts is not None:
                room = slots_ahead(passing)
                found[layer] = _loads(experts, micro_batches * rows, missing, in_host, room)
    return found


def _passing(
    shape: ModelShape, placement: Placement, stage: int, pools: ExpertPools, micro_batches: int
) -> int:
    held = layers_at_once(shape, placement.visits, stage) if micro_batches > 1 else 0
    return passing_slots(pools.device[stage], pools.slot_bytes, held)


def _loads(experts: Experts, rows: float, missing: float, in_host: float, room: int) -> Loads:
    hit = reached(experts, rows)
    loaded = hit * missing
    nbytes = loaded * experts.expert_bytes
    likely = loaded > 0 and hit >= LIKELY / RECENT * experts.count
    ahead = min(1.0, room / loaded) if likely else 0.0
    return Loads(hit, loaded, nbytes * (1.0 - in_host), nbytes * in_host, ahead)


def loads_ahead(
    shape: ModelShape,
    placement: Placement,
    pools: ExpertPools,
    ring_slots: Sequence[int],
    micro_batches: int,
) -> tuple[int, ...]:
    """Layers that each stage can hold or load at once when experts are loaded ahead of routers."""
    passing = (
        _passing(shape, placement, stage, pools, micro_batches)
        for stage in range(placement.num_stages)
    )
    pairs = enumerate(zip(passing, ring_slots, strict=True))
    return tuple(_ahead(shape, placement, stage, few, ring) for stage, (few, ring) in pairs)


def _ahead(shape: ModelShape, placement: Placement, stage: int, passing: int, ring: int) -> int:
    if not passing:
        return ring
    widest = max(len(placement.visits[v].layers) for v in placement.visits_of(stage))
    a_layer = max(num_experts(shape, (layer,)) for layer in placement.layers_of(stage))
    held = widest + min(LOOK_AHEAD, max(1, slots_ahead(passing) // a_layer))
    return min(held, ring) if ring else held
