"""What lies where once the KV pages have been counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.scheduler.experts import ExpertPools, num_experts, transit_slots
from headrace.scheduler.inputs import Budget, ModelShape
from headrace.scheduler.memory import (
    Cache,
    Layout,
    host_pages,
    page_bytes,
    slot_bytes,
    spread_out,
    transit_bytes,
    window_host_bytes,
    without_weights,
)
from headrace.scheduler.placement import Placement, StageMemory, Tier


@dataclass(frozen=True, slots=True)
class Filling:
    """Tiers of all layers and the memory that results; `pools` for experts in a split layout.

    Each stage has `host_pages` slots for KV pages in its host memory.
    """

    placement: Placement
    slot_bytes: int
    ring_slots: tuple[int, ...]
    memory: tuple[StageMemory, ...]
    pools: ExpertPools | None
    host_pages: int


def fill(
    shape: ModelShape, layout: Layout, budgets: Sequence[Budget], cache: Cache
) -> Filling | None:
    """Fill what the pages leave with resident layers, then host RAM; None if it does not fit.

    Resident layers are spread evenly among a stage's layers and host layers among the rest, so that
    fast layers hide the loads of slow ones. Experts of split layers have what those leave: every
    pass needs all of a layer's other weights.
    """
    tiers = [Tier.NVME] * shape.num_layers
    held = shape.held_bytes(split=layout.split)
    for stage, budget in enumerate(budgets):
        layers = layout.layers[stage]
        memory = without_weights(shape, layout, stage, cache)
        ring = layout.ring_slots * max(held)
        room = budget.device_memory - memory.device - transit_bytes(shape, layout, stage)
        resident = _take(held, layers, room, ring, layout.resident)
        if resident is None:
            return None
        rest = tuple(layer for layer in layers if layer not in resident)
        pinned = _take(held, rest, budget.host_weights, 0) or frozenset()
        for layer in layers:
            if layer in resident:
                tiers[layer] = Tier.DEVICE
            elif layer in pinned:
                tiers[layer] = Tier.HOST
    return _filled(shape, layout, budgets, cache, tuple(tiers))


def _take(
    held: Sequence[int], layers: tuple[int, ...], room: int, ring: int, wanted: int | None = None
) -> frozenset[int] | None:
    """As many evenly spread layers as `room` bytes hold: all of them, or fewer and a ring.

    Just `wanted` of them, if that is given. None when there is no room.
    """
    if wanted is not None:
        most = least = min(wanted, len(layers))
    else:
        smallest = min(held[layer] for layer in layers) if layers else 1
        most, least = min(max(room, 0) // smallest, len(layers)), 0
    for count in range(most, least - 1, -1):
        chosen = spread_out(layers, count)
        size = sum(held[layer] for layer in chosen)
        if size + (ring if count < len(layers) else 0) <= room:
            return chosen
    return None


def _filled(
    shape: ModelShape,
    layout: Layout,
    budgets: Sequence[Budget],
    cache: Cache,
    tiers: tuple[Tier, ...],
) -> Filling:
    placement = Placement(layout.num_stages, layout.visits, tiers)
    held = shape.held_bytes(split=layout.split)
    streamed = [placement.streamed(stage) for stage in range(layout.num_stages)]
    ring_slot_bytes = max((held[i] for layers in streamed for i in layers), default=0)
    ring_slots = tuple(layout.ring_slots if layers else 0 for layers in streamed)
    pages = host_pages(shape, layout, budgets, cache)
    memory = tuple(
        replace(
            without_weights(shape, layout, stage, cache),
            resident=_bytes_in(held, layout, stage, tiers, Tier.DEVICE),
            ring=ring_slots[stage] * ring_slot_bytes,
            host_layers=_bytes_in(held, layout, stage, tiers, Tier.HOST),
            process=budget.process_bytes,
            host_kv=pages * slot_bytes(page_bytes(shape, layout, stage)),
            host_window=window_host_bytes(shape, layout, stage, cache),
            host_log=budget.kv_log,
            host_adapters=budget.adapter_host_memory,
        )
        for stage, budget in enumerate(budgets)
    )
    if not layout.split:
        return Filling(placement, ring_slot_bytes, ring_slots, memory, None, pages)
    pools = _pools(shape, layout, budgets, memory)
    slots = zip(memory, pools.device, pools.host, strict=True)
    memory = tuple(
        replace(m, experts=device * pools.slot_bytes, host_experts=host * pools.slot_bytes)
        for m, device, host in slots
    )
    return Filling(placement, ring_slot_bytes, ring_slots, memory, pools, pages)


def _pools(
    shape: ModelShape, layout: Layout, budgets: Sequence[Budget], memory: Sequence[StageMemory]
) -> ExpertPools:
    """Slots in what is left of the budgets, no more than there are experts.

    Where nothing is to stay, no more than pass through: one layer's beside those that are needed.
    """
    nbytes, device, host = shape.expert_bytes, [], []
    for stage, (used, budget) in enumerate(zip(memory, budgets, strict=True)):
        layers = layout.layers[stage]
        total = most = num_experts(shape, layers)
        if layout.resident == 0:
            transit = transit_slots(shape, layout.visits, stage, layout.micro_batches)
            most = min(total, transit + max(num_experts(shape, (i,)) for i in layers))
        device.append(min(most, (budget.device_memory - used.device) // nbytes))
        room = (budget.host_weights - used.host_layers) // nbytes
        host.append(0 if device[-1] == total else min(total, room))
    return ExpertPools(nbytes, tuple(device), tuple(host))


def _bytes_in(
    held: Sequence[int], layout: Layout, stage: int, tiers: tuple[Tier, ...], tier: Tier
) -> int:
    return sum(held[i] for i in layout.layers[stage] if tiers[i] is tier)
